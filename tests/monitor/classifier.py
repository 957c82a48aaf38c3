"""The small classifier that the monitor's tests train, and what is asserted of its report."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from oracles import (
    assert_equal,
    per_sample_squared_norms,
    total,
    trace,
)
from torch_secorder import FisherMonitor

REDUCTIONS = ["mean", "sum"]


FIGURES = ["fisher_trace", "fisher_trace_stderr", "fisher_trace_share", "fisher_mean", "grad_sq_norm"]


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(n: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))


def cross_entropy(reduction: str = "mean", **options: Any) -> nn.Module:
    return nn.CrossEntropyLoss(reduction=reduction, **options)


def backward(model: nn.Module, x: Tensor, y: Tensor, reduction: str = "mean", scale: float = 1.0) -> None:
    (cross_entropy(reduction)(model(x), y) * scale).backward()


def norms(model: nn.Module, *batches: tuple[Tensor, Tensor], reduction: str = "mean") -> dict[str, Tensor]:
    """t_{n,p} of all the batches' samples, pooled."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return per_sample_squared_norms(model, cross_entropy(reduction), x, y)


def assert_report(monitor: FisherMonitor, squared: dict[str, Tensor], reduction: str = "mean") -> None:
    """The report's traces are those of per-sample squared norms t_{n,p}."""
    expected = trace(squared, reduction)
    report = monitor.report()
    assert list(report.index) == list(expected)
    for name, value in expected.items():
        assert_equal(torch.tensor(report.loc[name, "fisher_trace"]), value, total(expected), torch.float64)
    assert_equal(monitor.trace, total(expected), total(expected), torch.float64)
    assert monitor.n_samples == len(next(iter(squared.values())))


def assert_same_report(a: pd.DataFrame, b: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(a, b, rtol=1e-12, atol=0)
    assert a.attrs == b.attrs
