"""Every test starts from the same random state and leaves torch's defaults as they were.

``SEED=3 pytest`` starts from another one: a test that passes for one seed only has found what it looks for by luck.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from garbage import keep_from_the_collector

ALL_SLOW = re.compile(r"^pytestmark = (\[\s*)?pytest\.mark\.slow\b", re.MULTILINE)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", help="the default device of the tests in tests/traps")


def pytest_configure(config: pytest.Config) -> None:
    """The pretend device has to be there before the first backward pass; old versions of torch can't make one."""
    if config.getoption("--device") == "pretend":
        import pretend

        pretend.register()


def mark_slow(items: list[pytest.Item]) -> None:
    """Of a test with more than two parameters, `pytest -m "not slow"` runs the first, so that each test still runs."""
    of_one: dict[tuple[str, str], list[pytest.Item]] = defaultdict(list)
    for item in items:
        of_one[item.nodeid.split("::")[0], getattr(item, "originalname", item.name)].append(item)
    for alike in of_one.values():
        for item in alike[1:] if len(alike) > 2 else ():
            item.add_marker(pytest.mark.slow)


# The marker -m is applied to what this hook has left, so that it has to come first.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of what a device lacks do not run on it."""
    mark_slow(items)
    if (device := config.getoption("--device")) is None:
        return
    from pretend.lacking import LACKING

    lacking = LACKING.get(device, {})
    for item in items:
        if reason := lacking.get(getattr(item, "originalname", "")) or lacking.get(item.name):
            item.add_marker(pytest.mark.skip(f"{device} lacks {reason}"))


def pytest_collection_finish() -> None:
    """The collector passes over what was imported, by which tests that call it take a tenth of the time."""
    keep_from_the_collector()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Two folders run by themselves: torch is told of the pretend device for good, and a GPU is seldom there.

    A file of slow tests alone is not imported where none of them would run, since what it imports often takes seconds.
    """
    apart = collection_path.name in ("pretend", "on_gpu")
    if apart and not any(collection_path.name in argument for argument in config.args):
        return True
    if config.option.markexpr == "not slow" and collection_path.suffix == ".py":
        return True if ALL_SLOW.search(collection_path.read_text(encoding="utf-8")) else None
    return None


@pytest.fixture(autouse=True, scope="module")
def _kept_from_the_collector() -> Iterator[None]:
    """What a file leaves behind, such as what it imported and remembers, is not gone through again in each later file."""
    yield
    keep_from_the_collector()


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> Iterator[None]:
    seed = int(os.environ.get("SEED", "0"))
    # For each kind of device that has not been used yet, torch keeps the stack of who seeds it, which takes a millisecond.
    if torch.cuda.is_available() or request.config.getoption("--device"):
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
    default_dtype = torch.get_default_dtype()
    device, convolutions = request.config.getoption("--device"), torch.backends.cudnn.allow_tf32
    torch.set_default_device(device if "traps" in request.node.path.parts else None)
    if device == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # of which oracles know nothing
    yield
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.set_default_device(None)
    assert torch.get_default_dtype() == default_dtype
    assert torch.is_grad_enabled()
