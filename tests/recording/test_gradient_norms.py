"""The norms of the parameters' own gradients."""

from __future__ import annotations

import pytest
import torch

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
