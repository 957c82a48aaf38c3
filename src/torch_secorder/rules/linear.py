"""Layers that multiply features by a matrix."""

from __future__ import annotations

from torch import nn

from torch_secorder.capture.records import Call
from torch_secorder.errors import ShapeError
from torch_secorder.per_sample import Outer, sum_over
from torch_secorder.rules.registry import Gradients, register_rule


@register_rule(nn.Linear, depends_on=())
def linear(module: nn.Linear, call: Call) -> Gradients:
    """``y = x W^T + b`` over any number of middle axes, which are the positions that share W and b."""
    x, g = call.inputs[0] if call.inputs else call.kwargs["input"], call.grad_output
    if x.dim() < 2:
        raise ShapeError(f"a Linear got an input of shape {tuple(x.shape)}, without a batch axis")
    if x.dim() == 2:
        return {"weight": Outer(x[:, None, None], g[:, None, None], module.weight.shape), "bias": g}
    a, g = x.flatten(1, -2)[:, None], g.flatten(1, -2)[:, None]
    weight = Outer(call.shared(a), g, module.weight.shape)
    return {"weight": weight} if module.bias is None else {"weight": weight, "bias": sum_over(g, (1, 2))}
