"""Trap 31: a diagonal that is added up over so many passes that single precision stops counting."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from problems._base import Forward
from torch_secorder import FisherMonitor
from torch_secorder.per_sample import Dense, SquareSum
from torch_secorder.recording.quantities import Diagonal
from torch_secorder.recording.quantities.diagonal import PASSES_IN_SINGLE, DiagonalPart

PASSES = 100_000  # a plain sum in float32 is off by 1e-4 then


def summed(passes: int, shape: tuple[int, ...] = (1,)) -> Diagonal:
    """So many passes of 0.1 for each entry."""
    found, t = Diagonal(["p"], [shape]), torch.zeros(1, 1)
    part = DiagonalPart({0: [SquareSum.of(Dense(torch.full((1, *shape), 0.1**0.5)))]})
    for _ in range(passes):
        found.add(part, t, 1.0)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_trap_31_a_diagonal_over_many_passes(shape: tuple[int, ...]) -> None:
    (total,) = summed(PASSES, shape).totals
    assert total.shape == shape
    assert total.dtype == torch.float32
    assert float(total) == pytest.approx(0.1 * PASSES, rel=1e-6)


def test_trap_31_diagonals_merge_and_load_as_they_were_added_up() -> None:
    part, few = summed(PASSES // 4), summed(3)
    loaded = Diagonal(["p"], [(1,)])
    loaded.load(few.state())
    for _ in range(3):
        other = Diagonal(["p"], [(1,)])
        other.load(part.state())
        loaded.merge(other)
    loaded.merge(part)
    (total,) = loaded.totals
    assert float(total) == pytest.approx(0.1 * (PASSES + 3), rel=1e-6)


def test_trap_31_a_monitor_over_many_passes(tmp_path: Path) -> None:
    """The diagonal sums to the trace, which is added up in float64, also after it was saved in the middle."""
    pytest.importorskip("safetensors")
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    monitor = FisherMonitor(model, diagonal=True)
    for _ in range(3):
        with monitor:
            for _ in range(PASSES_IN_SINGLE):
                model(x).square().sum(1).mean().backward()
        before, at = copy.deepcopy(monitor.diagonal), tmp_path / "monitor"
        monitor.save(at)
        monitor = FisherMonitor.load(at, model)
        assert all(torch.equal(before[name].cpu(), value) for name, value in monitor.diagonal.items())
    for name, value in monitor.diagonal.items():
        assert float(value.double().sum()) == pytest.approx(monitor.report().fisher_trace[name], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("diagonal", [True, {"*": "rows"}], ids=["full", "rows"])
def test_trap_31_what_no_pass_reaches_is_zero_in_the_dtype_of_the_others(diagonal: Any, dtype: torch.dtype) -> None:
    model = Forward(lambda m, x: m.used(x), unused=nn.Linear(2, 2), used=nn.Linear(3, 2)).to(dtype)
    monitor = FisherMonitor(model, diagonal=diagonal)
    with monitor:
        model(torch.randn(4, 3).to(dtype)).square().sum(1).mean().backward()
    wide = torch.promote_types(dtype, torch.float32)
    for name, value in monitor.diagonal.items():
        assert value.dtype == wide, name
        assert bool(value.any()) == name.startswith("used"), name
