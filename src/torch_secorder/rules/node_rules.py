"""Rules for uses of a tensor that no module's forward explains: from a node of the autograd graph to per-sample gradients.

A node rule gets a place: a node whose output has samples, and one of its inputs that has none (a weight in F.linear, a
position embedding where it is added to the tokens). It gives that input's gradient for every sample. A node without a rule is
called with the gradient of each sample in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_secorder.autograd.nodes import fitted, is_plain, node_vjp, outputs_of
from torch_secorder.autograd.saved import knows
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.errors import CoverageError, ShapeError
from torch_secorder.model.nested import sample_rows, with_values
from torch_secorder.per_sample import (
    Dense,
    PerSampleGradient,
    sum_over,
)


@dataclass(
    eq=False, slots=True
)  # not frozen: a step may make one for each use, and that would take three times as long
class NodeUse:
    """Where a batch-free value meets the data. Nothing of it changes.

    Attributes:
        node: the autograd node.
        index: which of its inputs the value is.
        shape: the value's shape.
        output_shape: the shape of the node's output.
        placement: where the output has its samples.
        n: the number of samples.
        memo: intermediate results that the rules for several inputs of one node share.
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

    def vjp(self, g: Tensor) -> Tensor:
        """The gradient of the value as the node itself returns it, in the shape that the value was broadcast to."""
        if "at once" not in self.memo:
            self.memo["at once"] = node_vjp(self.node, [g])
        return self.found(self.memo["at once"])

    def found(self, results: Sequence[Tensor | None]) -> Tensor:
        """The gradient of the value, taken from the gradients of all inputs.

        Raises:
            CoverageError: if the node does not compute it.
        """
        result = results[self.index]
        if result is None:
            raise CoverageError(
                f"{self.node.name()} gives no gradient for what it uses: the backward pass under way was asked for some "
                "gradients only (inputs=); call backward() without"
            )
        return result.to_dense() if result.is_sparse else result

    def summed(self, product: Tensor) -> Tensor:
        """``product``, shaped like the output, summed to ``[axis of samples, *shape]``, which undoes the broadcast."""
        axis, lead = self.placement.axis, product.dim() - len(self.shape)
        sizes = [1] * lead + list(self.shape)
        axes = [d for d in range(product.dim()) if d != axis and sizes[d] == 1 != product.shape[d]]
        summed = sum_over(product, axes, keepdim=True) if axes else product
        return summed.movedim(axis, 0).reshape(product.shape[axis], *self.shape)


Gradients = tuple[Tensor | None, ...]
Function = Callable[[NodeUse, Any], PerSampleGradient | Tensor | None]


@dataclass(frozen=True)
class NodeRule:
    """A rule for nodes of one kind.

    Attributes:
        kind: the name of such nodes.
        function: from the place and the gradient of the node's output to the gradient of the value.
        when: tells whether the rule holds at a place.
        reads: the names of the saved values that ``function`` and ``when`` read.
        many: whether the rule takes the gradients of all of the node's outputs.
        calls: whether the rule calls the node.
    """

    kind: str
    function: Function
    when: Callable[[NodeUse], bool]
    reads: tuple[str, ...]
    many: bool
    calls: bool

    def holds(self, place: NodeUse) -> bool:
        """Whether the rule is exact here and this version of torch shows what it reads."""
        return knows(self.kind, *self.reads) and self.when(place)


_rules: dict[str, NodeRule] = {}


def node_rule(
    kind: str,
    when: Callable[[NodeUse], bool],
    *,
    reads: tuple[str, ...] = (),
    many: bool = False,
    calls: bool = False,
) -> Callable[[Function], Function]:
    """A decorator for the rule of the nodes called ``kind``, for the places where ``when`` is true."""

    def register(rule: Function) -> Function:
        _rules[kind] = NodeRule(kind, rule, when, reads, many, calls)
        return rule

    return register


class Found(NamedTuple):
    """The gradient of a value for every sample.

    Attributes:
        form: the gradient.
        rule: the name of the rule that gave it.
        at_once: whether a rule gave those of all samples at once; else the node was called for one sample after the other.
    """

    form: PerSampleGradient
    rule: str
    at_once: bool


def needs_node_call(place: NodeUse) -> bool:
    """Whether the gradient here takes calls of the node, for all samples or for one after the other."""
    rule = _rule_at(place)
    return rule is None or rule.calls


def _rule_at(place: NodeUse) -> NodeRule | None:
    """The rule that holds at a place, if there is one.

    A node whose output is a single number has no rows to take apart, and the rules are written for real numbers in plain tensors.
    """
    rule = _rules.get(place.node.name()) if place.output_shape else None
    return rule if rule is not None and is_plain(place.node) and rule.holds(place) else None


@cache
def _name_of_rule(kind: str) -> str:
    return kind.removesuffix("Backward0").removesuffix("Backward").lower()


def gradient_at(place: NodeUse, grads: Gradients, output: int) -> Found:
    """The gradient of the value for every sample, given those of the node's outputs.

    Args:
        place: which value.
        grads: one for each output of the node.
        output: the number of the output that ``place.placement`` describes.
    """
    name, rule = _name_of_rule(place.node.name()), _rule_at(place)
    single = all(grad is None for nr, grad in enumerate(grads) if nr != output)
    found = rule.function(place, grads if rule.many else grads[output]) if rule and (rule.many or single) else None
    if found is None:
        return Found(Dense(_one_by_one(place, grads)), f"{name}, one sample at a time", False)
    form = Dense(found) if isinstance(found, Tensor) else found
    groups = place.placement.grouping(place.n, form.like.device)
    return Found(form if groups is None else form.grouped_by_sample(groups), name, True)


def _one_by_one(place: NodeUse, grads: Gradients) -> Tensor:
    """``[n, *shape]`` from the node itself, given the gradients of one sample at a time."""
    if "one by one" not in place.memo:
        place.memo["one by one"] = [node_vjp(place.node, _alone(place, grads, sample)) for sample in range(place.n)]
    value, nr = place.node.next_functions[place.index]
    output, found = outputs_of(value)[nr], []
    for results in place.memo["one by one"]:
        result = place.found(results)
        found.append(fitted(result, output, keeps_dtype=True).reshape(place.shape))
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


def in_rows(*indices: int) -> Callable[[NodeUse], bool]:
    """A condition for rules: these inputs, of nodes whose output has the samples on its first axis."""
    return lambda at: at.index in indices and at.placement.axis == 0


def times(factor: float, g: Tensor) -> Tensor:
    """The gradient times a factor."""
    return g if factor == 1 else g * factor  # Over ten passes, needless copies cost a tenth of a plain step.
