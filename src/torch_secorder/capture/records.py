"""What is kept of one call of a module between its forward and its backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from torch_secorder.autograd.engine import current_node, saved_tensors_hooks
from torch_secorder.autograd.versions import versions
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.errors import CoverageError
from torch_secorder.model.ranks import class_as_written, whole
from torch_secorder.per_sample import Factor


@dataclass(eq=False)
class Forward:
    """One run of the model: what makes the calls of its modules belong to the same samples.

    Attributes:
        n: its batch size, None as long as nobody knows.
        calls: how often each parameter's module was called, by position in the parameter table.
        inside: False for calls of submodules with no call of the model around them.
        takers: how often each tensor was a call's first input, by its id while such a call has it.
        recomputed_in: the backward pass that runs this forward again (activation checkpointing), or None.
        records: its calls so far, each with the place in the graph where its gradient arrives; empty once it is over, since a
            record that holds its own node is a cycle that outlives the graph.
    """

    n: int | None = None
    calls: Counter[int] = field(default_factory=Counter)
    takers: dict[int, int] = field(default_factory=dict)
    inside: bool = True
    recomputed_in: int | None = None
    records: list[tuple[Record, GradientEdge]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Site:
    """A hooked module, with what is decided once for all of its calls.

    Attributes:
        parameters: local name -> position in the parameter table.
        tensors: local name -> the parameter, to notice when somebody swapped it.
        shapes: local name -> the parameter's shape.
        rule: from a :class:`Call` to per-sample gradients; this floor only carries it. None where only the output
            itself is of interest.
        placement: where its outputs have their samples; None to find out.
    """

    name: str
    module: nn.Module
    parameters: Mapping[str, int]
    tensors: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    rule: Any
    placement: Placement | None = None

    def __str__(self) -> str:
        return f"{class_as_written(self.module).__name__} '{self.name}'"

    @cached_property
    def positions(self) -> tuple[int, ...]:
        """Those of its parameters."""
        return tuple(self.parameters.values())

    @cached_property
    def family(self) -> tuple[Hashable, ...]:
        """What its small calls have in common with those that they can be put together with, as far as the site shows it."""
        return (self.rule.function, *self.shapes.items())


# Calls with fewer elements are put together before anything is computed: an operation costs as much as reading these.
SMALL = 2**15


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module as a rule sees it: every tensor with the batch axis first.

    Attributes:
        inputs: positional arguments.
        kwargs: keyword arguments.
        grad_output: gradient of the batch's loss with respect to the output.
        node: the autograd node under way, which is the one that made the output unless that is a view of what it made; None
            where the gradient comes from elsewhere.
        common: what calls with the same input have in common, for :meth:`factor`; None for others.
    """

    inputs: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    grad_output: Tensor
    node: Any = None
    common: dict[torch.Size, Factor] | None = None

    def factor(self, value: Tensor) -> Tensor | Factor:
        """``value``, a view of the input, as something whose Gram matrix is computed once for all calls with this input."""
        if self.common is None:
            return value
        found = self.common.get(value.shape)
        # Whatever else may have had the same id once: it is the same memory, which the one that is there keeps in use.
        if found is None or (found.value.data_ptr(), found.value.stride()) != (value.data_ptr(), value.stride()):
            found = self.common[value.shape] = Factor(value)
        return found

    def argument(self, position: int, name: str) -> Any:
        """An argument that callers may pass by position or by name."""
        return self.inputs[position] if len(self.inputs) > position else self.kwargs[name]


@dataclass(eq=False, slots=True)
class Record:
    """A call between its forward and its backward.

    Attributes:
        placement: where the output has its samples; None while that is not known, and for a call without a batch axis.
        in_output_graph: whether the graph of the model's outputs was seen to contain it.
        boundary: the graph's nodes that made the inputs.
        versions: how often each input had been changed in place when the module saw it.
        packed: whether the hooks for saved tensors have the inputs.
        last_pass: the last backward pass that reached it.
        moments: of the output, where only that is of interest.
    """

    site: Site
    forward: Forward
    inputs: tuple[Any, ...] | None
    kwargs: Mapping[str, Any]
    shape: torch.Size
    placement: Placement | None
    boundary: tuple[Node, ...]
    versions: tuple[int, ...] = ()
    packed: bool = False
    in_output_graph: bool = False
    last_pass: int | None = None
    moments: Tensor | None = None

    @classmethod
    def of(
        cls,
        site: Site,
        forward: Forward,
        inputs: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        shape: torch.Size,
        placement: Placement | None,
        boundary: tuple[Node, ...],
    ) -> Record:
        """A call as it is seen in forward."""
        if (hooks := saved_tensors_hooks()) is None:
            return cls(site, forward, inputs, kwargs, shape, placement, boundary, versions(inputs, kwargs))
        # A tensor that we kept ourselves would stay in memory, which is what checkpointing is there to avoid.
        inputs = tuple(_Packed(x, *hooks) if isinstance(x, Tensor) else x for x in inputs)
        kwargs = {k: _Packed(x, *hooks) if isinstance(x, Tensor) else x for k, x in kwargs.items()}
        return cls(site, forward, inputs, kwargs, shape, placement, boundary, packed=True)

    @property
    def starts_graph(self) -> bool:
        """Whether no input requires a gradient, so that nothing before this call is differentiated."""
        return not self.boundary

    def kind(self, grad: Tensor) -> Hashable | None:
        """The same for small calls that :meth:`joined` can put together; None for others."""
        site, inputs = self.site, self.inputs
        if grad.numel() > SMALL or grad.shape != self.shape or self.kwargs or not self.in_output_graph:
            return None
        if site.rule is None or site.rule.reads is None:
            return None
        if self.placement is None or self.placement.axis or self.placement.fold != "none":
            return None
        if inputs is None or len(inputs) != 1 or not isinstance(inputs[0], Tensor) or inputs[0].numel() > SMALL:
            return None
        x, settings = inputs[0], tuple([getattr(site.module, name) for name in site.rule.reads])
        return (site.family, settings, x.shape, x.dtype, self.shape, grad.dtype, grad.device)

    def call(self, grad: Tensor, common: dict[torch.Size, Factor] | None = None) -> Call:
        """What the rule needs, with the axis that counts samples first."""
        assert self.placement is not None
        inputs, kwargs = self._arguments()
        if not self.placement.axis:
            node = current_node()
            return Call(inputs, kwargs, grad if grad.shape == self.shape else grad.reshape(self.shape), node, common)
        first = partial(_first, axis=self.placement.axis, size=self.shape[self.placement.axis])
        return Call(
            tuple(first(x) for x in inputs), {k: first(x) for k, x in kwargs.items()}, first(grad.reshape(self.shape))
        )

    @staticmethod
    def joined(records: Sequence[Record], grads: Sequence[Tensor]) -> Call:
        """Calls of one :meth:`kind` as one of all of their samples in turn."""
        if len(records) == 1:
            return records[0].call(grads[0])
        return Call((torch.cat([record._arguments()[0][0] for record in records]),), {}, torch.cat(list(grads)))

    def shared_call(self, grads: Tensor) -> Call:
        """The same for a call without a batch axis, given the gradient of its output for every sample, ``[n, ...]``."""
        inputs, kwargs = self._arguments()
        each = partial(_for_each, n=len(grads))
        return Call(tuple(each(x) for x in inputs), {k: each(x) for k, x in kwargs.items()}, grads)

    def _arguments(self) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        if self.inputs is None:
            raise CoverageError(f"{self.site}: its inputs are gone, since a backward pass has been here already")
        if self.packed:
            self.inputs = tuple(_unpacked(x) for x in self.inputs)
            self.kwargs = {name: _unpacked(x) for name, x in self.kwargs.items()}
            self.versions, self.packed = versions(self.inputs, self.kwargs), False
        elif versions(self.inputs, self.kwargs) != self.versions:
            raise CoverageError(
                f"{self.site}: its input was changed in place after the layer saw it; change it out of place"
            )
        # What ranks compute in parts, the rules get whole.
        return tuple([whole(x) for x in self.inputs]), {name: whole(x) for name, x in self.kwargs.items()}


class _Packed:
    """A tensor that the hooks for saved tensors have, and give back once."""

    def __init__(self, value: Tensor, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]):
        self._packed, self._unpack = pack(value), unpack

    def value(self) -> Tensor:
        """The tensor."""
        return self._unpack(self._packed)


def _unpacked(value: Any) -> Any:
    return value.value() if isinstance(value, _Packed) else value


def _first(value: Any, axis: int, size: int) -> Any:
    if axis and isinstance(value, Tensor) and value.dim() > axis and value.shape[axis] == size:
        return value.movedim(axis, 0)
    return value


def _for_each(value: Any, n: int) -> Any:
    return value.expand(n, *value.shape) if isinstance(value, Tensor) else value
