"""A user's own function that puts samples into another order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Permuted(torch.autograd.Function):
    """Rows in another order. What it saved is a tensor, and no list of known functions has it."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return z[order]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0][ctx.saved_tensors[0].argsort()], None
