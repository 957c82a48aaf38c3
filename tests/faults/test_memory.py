"""Memory runs out, or leaks."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from faults.subjects import batch, loss_fn, model
from model_state import assert_same_gradients, gradients, hooks
from modes import ModeInside
from oracles import assert_equal, per_sample_squared_norms
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report
from torch_secorder.errors import CurvatureError, OutOfMemoryError

WORDS = "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory"
KINDS: dict[str, Callable[[], Exception]] = {
    "cpu": lambda: RuntimeError(WORDS),
    "gpu": lambda: torch.cuda.OutOfMemoryError("CUDA out of memory"),
    "python": MemoryError,
}


class Scarce(ModeInside):
    """No tensor of more than so many bytes is to be had where the library takes gradients apart."""

    def __init__(self, limit: int, error: Callable[[], Exception]):
        super().__init__()
        self.limit, self.error, self.refused = limit, error, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.nbytes > self.limit and not aliases(out, args) and inside():
            self.refused += 1
            raise self.error()
        return out


def aliases(out: Tensor, args: Any) -> bool:
    """Whether it's the memory of an argument."""
    theirs = {x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor)}
    return out.untyped_storage().data_ptr() in theirs


def inside() -> bool:
    """Whether the algebra is at work."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        if "torch_secorder/per_sample/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "linear over positions": lambda: (nn.Sequential(nn.Linear(12, 16), nn.Flatten(), nn.Linear(16 * 24, 3)), (24, 12)),
    "convolution": lambda: (
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 64, 3)),
        (3, 8, 8),
    ),
}


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    net, shape = MODELS[name]()
    return net.double(), torch.randn(16, *shape, dtype=torch.float64), torch.randint(3, (16,))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_fewer_samples_at_a_time_where_memory_runs_out(name: str, kind: str) -> None:
    net, x, y = problem(name)
    loss_fn(net(x), y).backward()
    plain = gradients(net)
    net.zero_grad()
    expected = per_sample_squared_norms(net, loss_fn, x, y)
    total = sum(t.mean() for t in expected.values())
    scarce = Scarce(24_000, KINDS[kind])
    with FisherMonitor(net, diagonal=True) as monitor, scarce:
        loss_fn(net(x), y).backward()
    assert scarce.refused > 2
    assert_same_gradients(gradients(net), plain)
    for row, t in expected.items():
        assert_equal(torch.tensor(monitor.report().loc[row, "fisher_trace"]), t.mean(), total, torch.float64)
        assert_equal(monitor.diagonal[row].sum(), t.mean(), total, torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_refusal_where_not_even_one_sample_fits(name: str, kind: str) -> None:
    net, x, y = problem(name)
    loss_fn(net(x), y).backward()
    plain = gradients(net)
    net.zero_grad()
    with FisherMonitor(net) as monitor:
        with pytest.raises(OutOfMemoryError, match=r"(?s)smaller batches") as raised, Scarce(64, KINDS[kind]):
            loss_fn(net(x), y).backward()
        assert isinstance(raised.value, (CurvatureError, MemoryError))
        assert_same_gradients(gradients(net), plain)
        assert monitor.n_samples == 0
        loss_fn(net(x), y).backward()
    expected = per_sample_squared_norms(net, loss_fn, x, y)
    total = sum(t.mean() for t in expected.values())
    assert_equal(monitor.trace, total, total, torch.float64)
    for run in (
        lambda: empirical_fisher_trace(net, loss_fn, x, y),
        lambda: fisher_report(net, loss_fn, (x, y), progress=False),
    ):
        with pytest.raises(OutOfMemoryError, match="smaller batches"), Scarce(64, KINDS[kind]):
            run()
        assert not any(hooks(net).values())


def test_an_allocation_that_really_fails() -> None:
    """Torch's own words for it are the ones that are understood."""
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        torch.empty(2**50)


# What grows


# Python remembers up to 4,096 attributes of classes by their names, and torch asks for some under a new string each time. These
# strings, of about 64 bytes, stay until others take their places: 120 KB more or less, whoever runs.
clear_attributes: Callable[[], None] = getattr(sys, "_clear_internal_caches", None) or sys._clear_type_cache


def footprint() -> dict[str, int]:
    gc.collect()
    clear_attributes()
    objects = gc.get_objects()
    return {
        "objects": len(objects),
        "tensors": sum(type(o) in (Tensor, nn.Parameter) for o in objects),
        "bytes": tracemalloc.get_traced_memory()[0],
    }


def resident() -> int:
    """Kibibytes of this process in memory, where the system tells."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
    except OSError:
        return 0


# In the first, everything is remembered that will be. Python 3.10 makes a cache for each function when it runs for the 1,024th
# time, and some run in two of three steps, or once in a block.
STEPS = {"one block": 220, "a block for each step": 100, "fisher_report": 100}
WARM_UP = {what: 220 if what == "one block" else 120 for what in STEPS}
if sys.version_info < (3, 11):
    WARM_UP = dict.fromkeys(STEPS, 1600)


def steps_of_training(subject: nn.Module, monitor: FisherMonitor, steps: int) -> None:
    x, y = batch()
    optimizer = torch.optim.SGD(subject.parameters(), lr=1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_fn(subject(x), y)
        if step % 3:  # every third forward has no backward
            loss.backward()
            optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("what", STEPS)
def test_nothing_grows_over_many_steps(what: str) -> None:
    """`python tests/faults/test_memory.py` does 10,000 of them."""
    subject = model()
    assert_no_growth(subject, what, STEPS[what])


def assert_no_growth(subject: nn.Module, what: str, steps: int) -> dict[str, Any]:
    monitor = FisherMonitor(subject)

    def run(count: int) -> None:
        if what == "one block":
            steps_of_training(subject, monitor, count)
        for _ in range(0 if what == "one block" else count):
            if what == "fisher_report":
                fisher_report(subject, loss_fn, batch(), progress=False, verify=False)
            else:
                with monitor:
                    steps_of_training(subject, monitor, 2)

    if what == "one block":
        monitor.__enter__()
    tracemalloc.start()  # first, so that what takes the place of something else does not seem to be more
    try:
        run(WARM_UP[what])
        inside, rss, before = hooks(subject), resident(), footprint()
        run(steps)
        after = footprint()
    finally:
        tracemalloc.stop()
    growth: dict[str, Any] = {key: after[key] - before[key] for key in before} | {"rss, KiB": resident() - rss}
    assert hooks(subject) == inside
    monitor.__exit__()
    assert not any(hooks(subject).values())
    assert growth["tensors"] <= 2, growth
    # A few come late, once; of what stays after each step there would be a hundred at least.
    assert growth["objects"] < max(steps // 20, 20), growth
    # A monitor remembers the numbers of up to 1,024 outputs, of 60 bytes each, and forgets all of them then.
    assert growth["bytes"] < 64 * 1024, growth
    assert growth["rss, KiB"] < 32 * 1024, growth
    return growth


if __name__ == "__main__":
    for what in STEPS:
        print(what, assert_no_growth(model(), what, 10_000 if what == "one block" else 2_500))
