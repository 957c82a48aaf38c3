"""The norms of the parameters' own gradients."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torch_secorder import FisherMonitor
from torch_secorder.recording import gradient_norms
from torch_secorder.recording.gradient_norms import norm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(999,), (1000,), (1001,), (7, 430), (20, 10, 30)], ids=str)
def test_a_gradient_of_half_precision_is_widened_in_parts(shape, dtype, monkeypatch):
    monkeypatch.setattr(gradient_norms, "WIDENED_AT_ONCE", 1000)
    grad = torch.randn(shape).to(dtype)
    for one in (grad, grad.mT if grad.dim() > 1 else grad):
        found = norm(one)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), one.double().norm(), rtol=1e-6, atol=0)  # float32's rounding


def test_what_half_precision_can_not_square_has_a_norm_and_nan_stays(monkeypatch):
    monkeypatch.setattr(gradient_norms, "WIDENED_AT_ONCE", 4)
    large = torch.full((10,), 1e4, dtype=torch.float16)
    torch.testing.assert_close(norm(large), large.float().norm(), rtol=1e-6, atol=0)
    large[-1] = float("nan")
    assert norm(large).isnan()


def test_a_gradient_that_arrives_in_parts_has_no_norm() -> None:
    """A tied layer inside of a re-entrant checkpoint and outside of it. The pass gives no norms then; its traces are right."""

    class Tied(nn.Module):
        def __init__(self, *, reentrant: bool) -> None:
            super().__init__()
            self.layer, self.head, self.reentrant = nn.Linear(4, 4), nn.Linear(4, 3), reentrant

        def forward(self, x: Tensor) -> Tensor:
            inside = checkpoint(lambda h: self.layer(h).tanh(), self.layer(x).tanh(), use_reentrant=self.reentrant)
            return self.head(inside)

    x, y = torch.randn(5, 4), torch.randint(3, (5,))
    reports = []
    for reentrant in (True, False):
        torch.manual_seed(0)
        model = Tied(reentrant=reentrant)
        with FisherMonitor(model) as monitor:
            for _ in range(4):
                model.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
        reports.append(monitor.report())
    parts, whole = (report["grad_sq_norm"] for report in reports)
    assert parts.isna().all()
    assert whole["layer.weight"] == pytest.approx(float(model.layer.weight.grad.square().sum()), rel=1e-5)
    pd.testing.assert_series_equal(*(report["fisher_trace"] for report in reports), rtol=1e-5)
