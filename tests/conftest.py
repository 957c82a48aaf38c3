"""Every test starts from the same random state and leaves torch's defaults as they were."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The pretend device's tests run by themselves: torch is told of it before the first backward pass, and for good."""
    asked = any("pretend" in argument for argument in config.args)
    return True if collection_path.name == "pretend" and not asked else None


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    default_dtype = torch.get_default_dtype()
    yield
    assert torch.get_default_dtype() == default_dtype
    assert torch.is_grad_enabled()
