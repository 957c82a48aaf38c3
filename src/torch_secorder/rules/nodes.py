"""Rules for uses of a tensor that no module's forward explains: from a node of the autograd graph to per-sample gradients.

A node rule gets the node, which of its inputs is meant, the gradient of its output with the batch axis's place, and returns
the gradient of that input, which is the same for all samples in the forward: a weight in F.linear, a position embedding where it
is added to the tokens. A node without a rule is asked for each sample's gradient in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_secorder.per_sample import Convolution, Dense, Outer, PerSampleGradient, Rows
from torch_secorder.placement import Placement


@dataclass(frozen=True)
class Arrival:
    """The gradient that arrived at a node.

    Attributes:
        node: the autograd node.
        index: which of its inputs is meant.
        shape: that input's shape.
        grad: the gradient of the node's output.
        placement: where that has its samples.
        n: how many samples.
    """

    node: Any
    index: int
    shape: tuple[int, ...]
    grad: Tensor
    placement: Placement
    n: int

    def rows(self, value: Tensor) -> Tensor:
        """``value`` with the axis that counts samples first."""
        return value.movedim(self.placement.axis, 0)

    def summed(self, product: Tensor) -> Tensor | None:
        """``product``, shaped like the output, summed to ``[batch axis, *shape]``: undoing a broadcast of the input.

        None if the input was not broadcast along the batch axis.
        """
        axis, lead = self.placement.axis, product.dim() - len(self.shape)
        if axis >= lead and self.shape[axis - lead] != 1:
            return None
        sizes = [1] * lead + list(self.shape)
        axes = [d for d in range(product.dim()) if d != axis and (d < lead or sizes[d] == 1 != product.shape[d])]
        summed = product.sum(axes, keepdim=True) if axes else product
        return summed.movedim(axis, 0).reshape(product.shape[axis], *self.shape)


NodeRule = Callable[[Arrival], PerSampleGradient | Tensor | None]
_rules: dict[str, NodeRule] = {}


def node_rule(name: str) -> Callable[[NodeRule], NodeRule]:
    """A decorator for the rule of the node called ``name``; the rule may return None where it does not apply."""

    def register(rule: NodeRule) -> NodeRule:
        _rules[name] = rule
        return rule

    return register


def gradient_at(arrival: Arrival) -> tuple[PerSampleGradient, str]:
    """The gradient of a node's input for every sample, and the name of the rule that gave it."""
    name = arrival.node.name()
    found = _rules[name](arrival) if name in _rules else None
    if found is None:
        return Dense(_one_by_one(arrival)), f"{_short(name)}, one sample at a time"
    form = Dense(found) if isinstance(found, Tensor) else found
    owner = arrival.placement.owner(form.n, arrival.n, arrival.grad.device)
    return (form if owner is None else form.regrouped(owner, arrival.n)), _short(name)


def _one_by_one(arrival: Arrival) -> Tensor:
    """``[n, *shape]`` from the node itself, given the gradient of one sample at a time."""
    grad, placement = arrival.grad, arrival.placement
    size = grad.shape[placement.axis]
    owner = placement.owner(size, arrival.n, grad.device)
    owner = torch.arange(size, device=grad.device) if owner is None else owner
    column = [-1] + [1] * (grad.dim() - placement.axis - 1)
    found = []
    for sample in range(arrival.n):
        alone = torch.where((owner == sample).view(column), grad, 0)
        results = arrival.node(alone)
        result = results[arrival.index] if isinstance(results, tuple) else results
        found.append(grad.new_zeros(arrival.shape) if result is None else result.reshape(arrival.shape))
    return torch.stack(found)


@node_rule("AddmmBackward0")
def addmm(at: Arrival) -> PerSampleGradient | Tensor | None:
    """``beta self + alpha mat1 mat2`` with samples in the rows of the result."""
    if at.index == 0:
        return at.summed(at.grad * at.node._saved_beta)
    if at.index == 1 or at.placement.axis != 0:
        return None
    return _rows_times(at.node._saved_mat1, at.grad * at.node._saved_alpha, at.shape)


@node_rule("MmBackward0")
def mm(at: Arrival) -> PerSampleGradient | None:
    """``self mat2`` with samples in the rows of the result."""
    if at.index == 0 or at.placement.axis != 0:
        return None
    return _rows_times(at.node._saved_self, at.grad, at.shape)


def _rows_times(x: Tensor, g: Tensor, shape: tuple[int, ...]) -> Outer:
    """The gradient ``x^T g`` of the right factor of a matrix product."""
    return Outer(g[:, None, None], x.to(g.dtype)[:, None, None], shape)


@node_rule("ConvolutionBackward0")
def convolution(at: Arrival) -> PerSampleGradient | Tensor | None:
    """Weight and bias of a convolution."""
    node, x, g = at.node, at.node._saved_input, at.grad
    if at.placement.axis != 0 or at.index == 0:
        return None
    if at.index == 2:
        return g.flatten(2).sum(2)
    if node._saved_transposed:
        if any(node._saved_output_padding):
            return None
        x, g = g, x
    settings = (node._saved_stride, node._saved_padding, node._saved_dilation, node._saved_groups)
    return Convolution(x[:, None], g[:, None], at.shape, *settings)


@node_rule("EmbeddingBackward0")
def embedding(at: Arrival) -> PerSampleGradient | None:
    """Rows of a table."""
    node, ids, g = at.node, at.node._saved_indices, at.grad
    if node._saved_scale_grad_by_freq or at.placement.axis >= ids.dim():
        return None
    padding = node._saved_padding_idx
    if 0 <= padding < at.shape[0]:
        g = g.masked_fill((ids == padding)[..., None], 0)
    ids, g = at.rows(ids), at.rows(g)
    return Rows(ids.reshape(len(ids), -1), g.reshape(len(g), -1, g.shape[-1]), at.shape)


@node_rule("NativeLayerNormBackward0")
def layer_norm(at: Arrival) -> Tensor | None:
    """Weight and bias of a layer norm."""
    node = at.node
    if at.index == 2:
        return at.summed(at.grad)
    normalised = (node._saved_input - node._saved_result1) * node._saved_result2
    return at.summed(at.grad * normalised) if at.index == 1 else None


@node_rule("MulBackward0")
def mul(at: Arrival) -> Tensor | None:
    """A factor that is broadcast along the batch."""
    other = at.node._saved_other if at.index == 0 else at.node._saved_self
    return at.summed(at.grad * other)


@node_rule("AddBackward0")
def add(at: Arrival) -> Tensor | None:
    """A summand that is broadcast along the batch."""
    return at.summed(at.grad if at.index == 0 else at.grad * at.node._saved_alpha)


@node_rule("SubBackward0")
def sub(at: Arrival) -> Tensor | None:
    """Either side of a difference that is broadcast along the batch."""
    return at.summed(at.grad if at.index == 0 else at.grad * -at.node._saved_alpha)


@node_rule("ExpandBackward0")
def expand(at: Arrival) -> Tensor | None:
    """A tensor that is expanded to the batch, as class tokens are."""
    return at.summed(at.grad)


def _short(name: str) -> str:
    return name.removesuffix("Backward0").removesuffix("Backward").lower()
