"""Convolutions of either kind."""

from __future__ import annotations

from torch import Tensor

from torch_secorder.autograd.saved import saved
from torch_secorder.per_sample import Convolution, PerSampleGradient, sum_over
from torch_secorder.rules.node_rules import NodeUse, in_rows, node_rule


@node_rule(
    "ConvolutionBackward0",
    lambda at: in_rows(1, 2)(at) and not any(saved(at.node, "output_padding")),
    reads=("input", "stride", "padding", "dilation", "groups", "transposed", "output_padding"),
)
def convolution(at: NodeUse, g: Tensor) -> PerSampleGradient | Tensor:
    """Weight and bias of a convolution."""
    if at.index == 2:
        return sum_over(g.flatten(2), (2,))
    x = saved(at.node, "input")
    x, g = (g, x) if saved(at.node, "transposed") else (x, g)
    axes = x.dim() - 2
    stride, padding, dilation = (saved(at.node, name) for name in ("stride", "padding", "dilation"))
    if len(padding) < axes:  # one number for all axes, as padding="valid" is saved
        padding = [*padding] * axes
    return Convolution(x[:, None], g[:, None], at.shape, stride, padding, dilation, saved(at.node, "groups"))
