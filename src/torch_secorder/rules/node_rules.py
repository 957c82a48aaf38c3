"""Rules for uses of a tensor that no module's forward explains: from a node of the autograd graph to per-sample gradients.

A node rule is told the place, a node whose output has samples and the input of it that has none (a weight in F.linear, a
position embedding where it is added to the tokens), and gives that input's gradient for every sample. A node without a rule
is called with the gradient of each sample in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_secorder.autograd.nodes import fitted, is_plain, node_vjp
from torch_secorder.autograd.saved import knows, saved
from torch_secorder.batch_axis.placement import Layout, Placement
from torch_secorder.errors import CoupledSamplesError, CoverageError, ShapeError
from torch_secorder.model.nested import sample_rows, with_values
from torch_secorder.per_sample import (
    Convolution,
    Dense,
    Outer,
    PerSampleGradient,
    RowSparse,
    at_least_float32,
    sum_over,
)
from torch_secorder.rules.bilinear import pairs
from torch_secorder.rules.elementwise import along_slope
from torch_secorder.rules.normalization import over_channels, with_running


@dataclass(frozen=True)
class NodeUse:
    """Where a batch-free value meets the data.

    Attributes:
        node: the autograd node.
        index: which of its inputs the value is.
        shape: the value's shape.
        output_shape: the node's output's.
        placement: where the output has its samples.
        n: how many samples.
        memo: what the rules for several inputs of one node share.
    """

    node: Any
    index: int
    shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    placement: Placement
    n: int
    memo: dict[str, Any] = field(default_factory=dict)

    def rows(self, value: Tensor) -> Tensor:
        """``value`` with the axis that counts samples first."""
        return value.movedim(self.placement.axis, 0)

    @property
    def is_broadcast(self) -> bool:
        """Whether the value is repeated along the axis that counts samples."""
        axis, lead = self.placement.axis, len(self.output_shape) - len(self.shape)
        return axis < lead or self.shape[axis - lead] == 1

    def summed(self, product: Tensor) -> Tensor:
        """``product``, shaped like the output, summed to ``[axis of samples, *shape]``: undoing the broadcast."""
        axis, lead = self.placement.axis, product.dim() - len(self.shape)
        sizes = [1] * lead + list(self.shape)
        axes = [d for d in range(product.dim()) if d != axis and sizes[d] == 1 != product.shape[d]]
        summed = sum_over(product, axes, keepdim=True) if axes else product
        return summed.movedim(axis, 0).reshape(product.shape[axis], *self.shape)


Gradients = tuple[Tensor | None, ...]
Function = Callable[[NodeUse, Any], PerSampleGradient | Tensor]


@dataclass(frozen=True)
class NodeRule:
    """A rule for nodes of one kind.

    Attributes:
        kind: the name of such nodes.
        function: from the place and the gradient of the node's output to that of the value.
        when: the places where it holds.
        reads: what it and ``when`` read of what the node saved.
        many: whether it takes the gradients of all of the node's outputs.
        after: whether it is better asked when the node has run, for what that leaves behind.
    """

    kind: str
    function: Function
    when: Callable[[NodeUse], bool]
    reads: tuple[str, ...]
    many: bool
    after: bool

    def holds(self, place: NodeUse) -> bool:
        """Whether the rule is exact here, and this torch shows what it reads."""
        return knows(self.kind, *self.reads) and self.when(place)


_rules: dict[str, NodeRule] = {}


def node_rule(
    kind: str,
    when: Callable[[NodeUse], bool],
    *,
    reads: tuple[str, ...] = (),
    many: bool = False,
    after: bool = False,
) -> Callable[[Function], Function]:
    """A decorator for the rule of the nodes called ``kind``, for the places where ``when`` is true."""

    def register(rule: Function) -> Function:
        _rules[kind] = NodeRule(kind, rule, when, reads, many, after)
        return rule

    return register


def runs_after_node(node: Any) -> bool:
    """Whether the rule for such nodes is better asked when the node has run."""
    rule = _rules.get(node.name())
    return rule is not None and rule.after


def has_rule(place: NodeUse) -> bool:
    """Whether a rule knows the gradient here without a call of the node."""
    return _rule_at(place) is not None


def _rule_at(place: NodeUse) -> NodeRule | None:
    """The rule that holds at a place, if there is one.

    A node whose output is a single number has no rows to take apart, and the rules are written for real numbers in plain tensors.
    """
    rule = _rules.get(place.node.name()) if place.output_shape else None
    return rule if rule is not None and is_plain(place.node) and rule.holds(place) else None


def gradient_at(place: NodeUse, grads: Gradients, output: int) -> tuple[PerSampleGradient, str]:
    """The gradient of the value for every sample, given those of the node's outputs, and the name of the rule that gave it.

    Args:
        place: which value.
        grads: one for each output of the node.
        output: the one that the place's placement is of.
    """
    name = place.node.name().removesuffix("Backward0").removesuffix("Backward").lower()
    rule = _rule_at(place)
    single = all(grad is None for nr, grad in enumerate(grads) if nr != output)
    if rule is None or not (rule.many or single):
        return Dense(_one_by_one(place, grads)), f"{name}, one sample at a time"
    found = rule.function(place, grads if rule.many else grads[output])
    form = Dense(found) if isinstance(found, Tensor) else found
    groups = place.placement.grouping(place.n, form.like.device)
    return (form if groups is None else form.grouped_by_sample(groups)), name


def _one_by_one(place: NodeUse, grads: Gradients) -> Tensor:
    """``[n, *shape]`` from the node itself, given the gradients of one sample at a time."""
    if "one by one" not in place.memo:
        place.memo["one by one"] = [node_vjp(place.node, _alone(place, grads, sample)) for sample in range(place.n)]
    found = []
    for results in place.memo["one by one"]:
        result = results[place.index]
        if result is None:
            raise CoverageError(
                f"{place.node.name()} gives no gradient for what it uses: the backward pass under way was asked for some "
                "gradients only (inputs=); call backward() without"
            )
        result = result.to_dense() if result.is_sparse else result
        found.append(fitted(result, *place.node.next_functions[place.index], keeps_dtype=True).reshape(place.shape))
    return torch.stack(found)


def _alone(place: NodeUse, grads: Gradients, sample: int) -> list[Tensor | None]:
    """The gradients with every other sample's part set to zero."""
    if place.n == 1:
        return list(grads)
    alone: list[Tensor | None] = []
    axis = place.placement.axis
    for grad in grads:
        if grad is not None and not place.placement.fits(grad.shape, place.n):
            raise ShapeError(
                f"the {place.n} samples are not on axis {axis} of {tuple(grad.shape)} behind {place.node.name()}"
            )
        if grad is None:
            alone.append(None)
            continue
        if grad.is_nested:
            values, own = grad.values(), sample_rows(grad) == sample
            alone.append(with_values(grad, values * own.view(-1, *[1] * (values.dim() - 1))))
            continue
        size = grad.shape[axis]
        owner = place.placement.sample_of_index(size, place.n, grad.device)
        owner = torch.arange(size, device=grad.device) if owner is None else owner
        column = [-1] + [1] * (grad.dim() - axis - 1)
        alone.append(torch.where((owner == sample).view(column), grad, 0))
    return alone


def _in_rows(*indices: int) -> Callable[[NodeUse], bool]:
    """For these inputs of nodes that have samples on the first axis of their output."""
    return lambda at: at.index in indices and at.placement.axis == 0


def _rows_times(x: Tensor, g: Tensor, shape: tuple[int, ...]) -> Outer:
    """The gradient ``x^T g`` of the right factor of a matrix product."""
    return Outer(g[:, None, None], x.to(g.dtype)[:, None, None], shape)


def _times(factor: float, g: Tensor) -> Tensor:
    return g if factor == 1 else g * factor  # a copy for nothing is a tenth of a plain step in ten passes


@node_rule(
    "AddmmBackward0",
    lambda at: at.is_broadcast if at.index == 0 else _in_rows(2)(at),
    reads=("alpha", "beta", "left"),
)
def addmm(at: NodeUse, g: Tensor) -> PerSampleGradient | Tensor:
    """``beta self + alpha mat1 mat2`` with samples in the rows of the result."""
    if at.index == 0:
        return at.summed(_times(saved(at.node, "beta"), g))
    return _rows_times(saved(at.node, "left"), _times(saved(at.node, "alpha"), g), at.shape)


@node_rule("MmBackward0", _in_rows(1), reads=("left",))
def mm(at: NodeUse, g: Tensor) -> PerSampleGradient:
    """``self mat2`` with samples in the rows of the result."""
    return _rows_times(saved(at.node, "left"), g, at.shape)


@node_rule("BmmBackward0", lambda at: at.index == 1 and at.placement.axis == 1, reads=("left",))
def bmm(at: NodeUse, g: Tensor) -> PerSampleGradient:
    """``self mat2`` for several matrices, with samples in the rows of each result; einsum is made of these."""
    g, x = (value.transpose(0, 1)[:, :, None] for value in (g, saved(at.node, "left").to(g.dtype)))
    return Outer(g, x, at.shape)


@node_rule(
    "ConvolutionBackward0",
    lambda at: _in_rows(1, 2)(at) and not any(saved(at.node, "output_padding")),
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


@node_rule(
    "EmbeddingBackward0",
    lambda at: at.placement.axis < saved(at.node, "ids").dim(),
    reads=("ids", "padding_id", "by_frequency"),
)
def embedding(at: NodeUse, g: Tensor) -> PerSampleGradient:
    """Rows of a table."""
    ids, padding = saved(at.node, "ids"), saved(at.node, "padding_id")
    if saved(at.node, "by_frequency"):
        raise CoupledSamplesError("an embedding with scale_grad_by_freq=True divides by frequencies in the whole batch")
    if 0 <= padding < at.shape[0]:
        g = g.masked_fill((ids == padding)[..., None], 0)
    ids, g = at.rows(ids), at.rows(g)
    ids = ids.reshape(len(ids), -1)
    return RowSparse(ids, g.reshape(*ids.shape, g.shape[-1]), at.shape)


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


@node_rule("NativeGroupNormBackward0", _in_rows(1, 2), reads=("input", "groups", "mean", "scale"))
def group_norm(at: NodeUse, g: Tensor) -> Tensor:
    """Weight and bias of a group norm."""
    if "sums" not in at.memo:
        x, (mean, scale) = saved(at.node, "input"), (saved(at.node, name)[..., None] for name in ("mean", "scale"))
        normalized = _normalized(x.reshape(len(x), saved(at.node, "groups"), -1), mean, scale, (2,)).view(x.shape)
        at.memo["sums"] = over_channels(normalized, g.to(normalized.dtype))
    sums: tuple[Tensor, Tensor] = at.memo["sums"]
    return sums[at.index - 1]


def _normalized(x: Tensor, mean: Tensor, scale: Tensor, axes: tuple[int, ...]) -> Tensor:
    """``x`` less its mean over these axes, and times its scale, which are the statistics that a node saved of it.

    To autograd they are constants, so that a graph needs the input's own. What those differ by is the norm's eps.
    """
    if torch.is_grad_enabled():
        mean, variance = x.mean(axes, keepdim=True), x.var(axes, unbiased=False, keepdim=True)
        scale = (variance + (scale.reciprocal().square() - variance).detach()).rsqrt()
    return (at_least_float32(x) - mean) * scale


_RUNNING = ("input", "mean", "variance", "eps", "training")


@node_rule("CudnnBatchNormBackward0", lambda at: _in_rows(1, 2)(at) and not saved(at.node, "training"), reads=_RUNNING)
@node_rule("NativeBatchNormBackward0", lambda at: _in_rows(1, 2)(at) and not saved(at.node, "training"), reads=_RUNNING)
def batch_norm(at: NodeUse, g: Tensor) -> Tensor:
    """Weight and bias of a batch norm with running statistics."""
    if "sums" not in at.memo:
        statistics = (saved(at.node, name) for name in ("mean", "variance", "eps"))
        at.memo["sums"] = with_running(saved(at.node, "input"), g, *statistics)
    sums: tuple[Tensor, Tensor] = at.memo["sums"]
    return sums[at.index - 1]


@node_rule("PreluKernelBackward0", lambda at: at.index == 1 and at.is_broadcast, reads=("input",))
def prelu(at: NodeUse, g: Tensor) -> Tensor:
    """Slopes below zero."""
    return at.summed(along_slope(saved(at.node, "input"), g))


def _is_bilinear(node: Any) -> bool:
    expanded = ("expand1", "expand2", "expand3", "summed")
    return [list(saved(node, name)) for name in expanded] == [[1, 3], [0], [1, 2], [2, 3]]


@node_rule(
    "TrilinearBackward0",
    lambda at: _in_rows(1)(at) and _is_bilinear(at.node),
    reads=("left", "right", "expand1", "expand2", "expand3", "summed"),
)
def bilinear(at: NodeUse, g: Tensor) -> PerSampleGradient:
    """The weight of ``y_o = x1^T W_o x2``."""
    return Outer(pairs(saved(at.node, "left"), saved(at.node, "right"))[:, None, None], g[:, None, None], at.shape)


def _repeats_samples(at: NodeUse) -> bool:
    """Whether no sample has a part of a repetition only."""
    whole = at.placement.layout is Layout.BLOCKS and saved(at.node, "times")[at.placement.axis] % at.n == 0
    return at.is_broadcast or whole


@node_rule("RepeatBackward0", _repeats_samples, reads=("times",))
def repeat(at: NodeUse, g: Tensor) -> Tensor:
    """A tensor that is repeated for every sample."""
    times, axis = saved(at.node, "times"), at.placement.axis
    sizes = [1] * (g.dim() - len(at.shape)) + list(at.shape)
    g = g.reshape([size for pair in zip(times, sizes, strict=True) for size in pair])
    others = [2 * d for d in range(len(times)) if d != axis]
    return (sum_over(g, others) if others else g).movedim(axis, 0).reshape(times[axis], *at.shape)


@node_rule("MulBackward0", lambda at: at.is_broadcast, reads=("left", "right"))
def mul(at: NodeUse, g: Tensor) -> Tensor:
    """A factor that is broadcast along the batch."""
    return at.summed(g * saved(at.node, "right" if at.index == 0 else "left"))


@node_rule("AddBackward0", lambda at: at.is_broadcast, reads=("alpha",))
def add(at: NodeUse, g: Tensor) -> Tensor:
    """A summand that is broadcast along the batch."""
    return at.summed(g if at.index == 0 else _times(saved(at.node, "alpha"), g))


@node_rule("SubBackward0", lambda at: at.is_broadcast, reads=("alpha",))
def sub(at: NodeUse, g: Tensor) -> Tensor:
    """Either side of a difference that is broadcast along the batch."""
    return at.summed(g if at.index == 0 else g * -saved(at.node, "alpha"))


@node_rule("ExpandBackward0", lambda at: at.is_broadcast)
def expand(at: NodeUse, g: Tensor) -> Tensor:
    """A tensor that is expanded to the batch, as class tokens are."""
    return at.summed(g)
