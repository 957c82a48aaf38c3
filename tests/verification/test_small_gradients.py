"""Gradients that are far smaller than those of the outputs are checked by their own size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_secorder import FisherMonitor
from torch_secorder.errors import CoverageError


class Scaled(nn.Module):
    """A branch behind a small factor, as a layer scale has at first."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.branch, self.scale = nn.Linear(4, 3), scale

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :3] + self.scale * self.branch(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 1e-6, 1e-9, 1e-15])
@pytest.mark.parametrize("options", [{}, {"parameters": ["branch.bias"]}], ids=["all", "bias"])
def test_a_use_by_the_loss_is_found_however_small_it_is(
    options: dict[str, Any], scale: float, dtype: torch.dtype
) -> None:
    """The rounding of the outputs' gradients is larger than all of these, and excuses nothing."""
    model = Scaled(scale).to(dtype)
    x, y = torch.randn(8, 4, dtype=dtype), torch.randn(8, 3, dtype=dtype)
    refused = pytest.raises(CoverageError, match="is not the sum of what the model's samples contribute")
    with refused, FisherMonitor(model, **options):
        F.mse_loss(model(x) + scale * model.branch.bias * x[:, 1:], y).backward()
