"""Weights and biases of norms."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_secorder.autograd.saved import saved
from torch_secorder.per_sample import at_least_float32
from torch_secorder.rules.node_rules import NodeUse, in_rows, node_rule
from torch_secorder.rules.normalization import over_channels, with_running


@node_rule(
    "NativeLayerNormBackward0",
    lambda at: at.index in (1, 2) and at.is_broadcast,
    reads=("input", "shape", "mean", "scale"),
)
def layer_norm(at: NodeUse, g: Tensor) -> Tensor:
    """Weight and bias of a layer norm."""
    if at.index == 2:
        return at.summed(g)
    axes = tuple(range(-len(saved(at.node, "shape")), 0))
    return at.summed(g * _normalized(saved(at.node, "input"), saved(at.node, "mean"), saved(at.node, "scale"), axes))


@node_rule("FusedRmsNormBackward0", lambda at: at.index == 1 and at.is_broadcast, reads=("input", "shape", "scale"))
def rms_norm(at: NodeUse, g: Tensor) -> Tensor:
    """The weight of a root mean square norm, which is one node on GPUs; elsewhere the norm consists of other nodes."""
    x, size = at_least_float32(saved(at.node, "input")), len(saved(at.node, "shape"))
    scale = saved(at.node, "scale").reshape(*x.shape[:-size], *[1] * size)
    if torch.is_grad_enabled():  # Autograd takes the saved scale for a constant, as in ``_normalized``.
        square = x.square().mean(tuple(range(-size, 0)), keepdim=True)
        scale = (square + (scale.reciprocal().square() - square).detach()).rsqrt()
    return at.summed(g * (x * scale))


@node_rule("NativeGroupNormBackward0", in_rows(1, 2), reads=("input", "groups", "mean", "scale"))
def group_norm(at: NodeUse, g: Tensor) -> Tensor:
    """Weight and bias of a group norm."""
    if "sums" not in at.memo:
        x, (mean, scale) = saved(at.node, "input"), (saved(at.node, name)[..., None] for name in ("mean", "scale"))
        normalized = _normalized(x.reshape(len(x), saved(at.node, "groups"), -1), mean, scale, (2,)).view(x.shape)
        at.memo["sums"] = over_channels(normalized, g.to(normalized.dtype))
    sums: tuple[Tensor, Tensor] = at.memo["sums"]
    return sums[at.index - 1]


def _normalized(x: Tensor, mean: Tensor, scale: Tensor, axes: tuple[int, ...]) -> Tensor:
    """``x`` minus its mean over these axes, times its scale, with the statistics that a node saved.

    Autograd takes saved statistics for constants. If a graph is needed, the input's own ones replace them; the two scales
    differ by the norm's eps.
    """
    if torch.is_grad_enabled():
        mean, variance = x.mean(axes, keepdim=True), x.var(axes, unbiased=False, keepdim=True)
        scale = (variance + (scale.reciprocal().square() - variance).detach()).rsqrt()
    return (at_least_float32(x) - mean) * scale


_RUNNING = ("input", "mean", "variance", "eps", "training")


@node_rule("CudnnBatchNormBackward0", lambda at: in_rows(1, 2)(at) and not saved(at.node, "training"), reads=_RUNNING)
@node_rule("NativeBatchNormBackward0", lambda at: in_rows(1, 2)(at) and not saved(at.node, "training"), reads=_RUNNING)
def batch_norm(at: NodeUse, g: Tensor) -> Tensor:
    """Weight and bias of a batch norm with running statistics."""
    if "sums" not in at.memo:
        statistics = (saved(at.node, name) for name in ("mean", "variance", "eps"))
        at.memo["sums"] = with_running(saved(at.node, "input"), g, *statistics)
    sums: tuple[Tensor, Tensor] = at.memo["sums"]
    return sums[at.index - 1]
