"""Parameters that act on single elements."""

from __future__ import annotations

from torch import Tensor, nn

from torch_secorder.capture.records import Call
from torch_secorder.per_sample import sum_over
from torch_secorder.rules.registry import Gradients, register_rule


@register_rule(nn.PReLU)
def prelu(module: nn.PReLU, call: Call) -> Gradients:
    """``y = x`` above zero and ``weight * x`` below; one weight, or one for each channel on axis 1."""
    product = along_slope(call.argument(0, "input"), call.grad_output)
    if module.num_parameters == 1:
        return {"weight": sum_over(product.flatten(1), (1,), keepdim=True) if product.dim() > 1 else product[:, None]}
    return {"weight": sum_over(product.reshape(*product.shape[:2], -1), (2,))}


def along_slope(x: Tensor, g: Tensor) -> Tensor:
    """Each element's contribution to the gradient of the slope, which multiplies it if it is below zero."""
    return x.clamp(max=0) * g
