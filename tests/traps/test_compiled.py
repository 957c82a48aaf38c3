"""Trap 11: torch.compile, and wrappers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from oracles import assert_equal, per_sample_squared_norms
from torch_secorder import FisherMonitor, fisher_report
from torch_secorder.errors import CurvatureError
from traps.exactness import assert_report_exact, drawn, numbers


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(  # one backend traces the backward pass too; every way and every history has met each
    ("how", "warm", "backend"),
    [
        ("wrapped", False, "eager"),
        ("wrapped", True, "aot_eager"),
        ("in_place", False, "aot_eager"),
        ("in_place", True, "eager"),
        ("submodule", False, "aot_eager"),
        ("submodule", True, "eager"),
    ],
)
def test_trap_11_a_compiled_model(how: str, warm: bool, backend: str) -> None:
    torch._dynamo.reset()
    model, x, y = drawn(small(), 5, 4)
    expected = per_sample_squared_norms(model, numbers, x, y)
    if how == "wrapped":
        compiled: Any = torch.compile(model, backend=backend)
    elif how == "in_place":
        compiled = copy.deepcopy(model)
        compiled.compile(backend=backend)
    else:
        compiled = nn.Sequential(copy.deepcopy(model), nn.Identity())
        compiled[0].compile(backend=backend)
        expected = {f"0.{name}": t for name, t in expected.items()}
    if warm:
        numbers(compiled(x), y).backward()
    try:
        with FisherMonitor(compiled) as monitor:
            numbers(compiled(x), y).backward()
        for name, t in expected.items():
            assert_equal(torch.tensor(monitor.report().loc[name, "fisher_trace"]), t.mean(), monitor.trace)
        assert_report_exact(compiled, x, y, expected=expected)
    finally:
        torch._dynamo.reset()


def test_trap_11_data_parallel_is_refused() -> None:
    model = nn.DataParallel(small())
    with pytest.raises(CurvatureError, match=r"DataParallel.*DistributedDataParallel"):
        FisherMonitor(model)
    with pytest.raises(CurvatureError, match=r"DataParallel"):
        fisher_report(model, numbers, (torch.randn(5, 4), torch.randn(5, 3)), progress=False)
