"""Layers that multiply two inputs."""

from __future__ import annotations

from torch import Tensor, nn

from torch_secorder.capture.records import Call
from torch_secorder.errors import ShapeError
from torch_secorder.per_sample import Outer, sum_over
from torch_secorder.rules.registry import Gradients, register_rule


@register_rule(nn.Bilinear)
def bilinear(module: nn.Bilinear, call: Call) -> Gradients:
    """``y_o = x1^T W_o x2 + b_o``: a matrix that multiplies the outer products of both inputs."""
    x1, x2, g = call.argument(0, "input1"), call.argument(1, "input2"), call.grad_output
    if x1.dim() < 2:
        raise ShapeError(f"a Bilinear got an input of shape {tuple(x1.shape)}, without a batch axis")
    a = pairs(x1, x2)
    a, g = a.reshape(a.shape[0], 1, -1, a.shape[-1]), g.reshape(g.shape[0], 1, -1, g.shape[-1])
    return {"weight": Outer(a, g, module.weight.shape), "bias": sum_over(g, (1, 2))}


def pairs(x1: Tensor, x2: Tensor) -> Tensor:
    """Every product of an entry of one input and an entry of the other, on one axis."""
    return (x1[..., :, None] * x2[..., None, :]).flatten(-2)
