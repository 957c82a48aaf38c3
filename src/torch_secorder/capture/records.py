"""What is kept of a module's call from its forward to its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from torch_secorder.autograd.engine import current_node
from torch_secorder.autograd.node_hooks import TableReference, no_table
from torch_secorder.autograd.versions import version
from torch_secorder.batch_axis.evidence import Unplaced
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.capture.model_run import Forward
from torch_secorder.errors import CoverageError, CurvatureError
from torch_secorder.model.nested import whole
from torch_secorder.model.ranks import class_as_written
from torch_secorder.per_sample import PerSampleGradient, SharedFactor


@dataclass(frozen=True)
class Idle:
    """The reason why no gradient is expected: a search found none, or only one that belongs to several samples at once.

    Attributes:
        why: what the search found.
        forget: forgets that, so that the next graph of this kind is searched again.
    """

    why: Unplaced
    forget: Callable[[], object]


@dataclass(eq=False)  # not frozen: each block makes one for each module, and that would take twice as long
class HookedModule:
    """A hooked module, with what is decided once for all of its calls. Nothing of it changes.

    Attributes:
        name: its name in the model.
        module: the module.
        parameters: local name -> the parameter's position in the table.
        tensors: local name -> the parameter, to notice when somebody has replaced it.
        shapes: local name -> the parameter's shape.
        rule: a function from a :class:`Call` to per-sample gradients; None where only the output itself is of interest.
        placement: where its outputs have their samples; None if that is to be found out.
        keep: a function of ``(module, args, kwargs, output)`` that returns what to keep of a call, for a rule that needs
            something else than the inputs; None for a rule that needs the inputs.
        number: its place among the model's modules, which tables follow.
        positions: the positions of its parameters in the table.
    """

    name: str
    module: nn.Module
    parameters: Mapping[str, int]
    tensors: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    rule: Any
    placement: Placement | None = None
    keep: Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any], Tensor], Any] | None = None
    number: int = 0
    positions: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.positions = tuple(self.parameters.values())

    @cached_property
    def shapes_by_name(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The parameters' shapes with their local names, to compare them with another module's."""
        return tuple(self.shapes.items())

    def __str__(self) -> str:
        return f"{self.kind} '{self.name}'"

    @property
    def kind(self) -> str:
        """The name of the module's class."""
        return class_as_written(self.module).__name__

    def forms(self, call: Call) -> dict[str, PerSampleGradient]:
        """The per-sample gradients that the rule finds for a call, by local name.

        Raises:
            CurvatureError: if the rule does; the module's name is added.
        """
        try:
            found: dict[str, PerSampleGradient] = self.rule(self.module, call, self.shapes)
        except CurvatureError as error:
            raise type(error)(f"{self}: {error}") from error
        return found


# Calls with fewer elements are computed together, since starting an operation takes as long as reading so few.
SMALL = 2**15


@dataclass(frozen=True, eq=False, slots=True)
class Call:
    """One call of a module as a rule sees it: every tensor with the batch axis first, nested ones padded with zeros.

    Attributes:
        inputs: positional arguments.
        kwargs: keyword arguments.
        grad_output: gradient of the batch's loss with respect to the output.
        node: the node whose hook is running: it made the output, or the tensor that the output is a view of. None where the
            gradient comes from elsewhere.
        shared_factors: Gram matrices shared with other layers that received the same input tensor; None if no other did.
        kept: what the hooked module's ``keep`` took of the call, as it was in the forward.
        batch_axis: the axis that counted the samples before it was moved; None if the call had none.
        training: whether the module was in training mode when it was called.
    """

    inputs: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    grad_output: Tensor
    node: Any = None
    shared_factors: dict[torch.Size, SharedFactor] | None = None
    kept: Any = None
    batch_axis: int | None = 0
    training: bool = False

    def shared(self, value: Tensor) -> Tensor | SharedFactor:
        """A view of the input as a factor whose Gram matrix is computed once for all calls with this input."""
        if self.shared_factors is None:
            return value
        found = self.shared_factors.get(value.shape)
        # Tensors are compared by address and stride, not by id. The factor that is there keeps its tensor alive, so that a tensor
        # at the same address has the same data.
        if found is None or (found.value.data_ptr(), found.value.stride()) != (value.data_ptr(), value.stride()):
            found = self.shared_factors[value.shape] = SharedFactor(value)
        return found

    def argument(self, position: int, name: str) -> Any:
        """An argument that callers may pass by position or by name."""
        return self.inputs[position] if len(self.inputs) > position else self.kwargs[name]


@dataclass(eq=False, slots=True)
class Record:
    """A recorded call of a module, from its forward to its backward pass.

    Attributes:
        site: the hooked module.
        forward: the run of the model that the call belongs to.
        inputs: the positional arguments; None once they were used and dropped.
        kwargs: the keyword arguments.
        shape: the shape of the output; for a nested output, that of the padded tensor.
        placement: where the output has its samples; None while that is not known, and for a call without a batch axis.
        starts_graph: whether no input requires a gradient, so that nothing before this call is differentiated.
        input_nodes: the nodes that made the inputs. They are dropped when the run of the model is over: if a module returns its
            input, one of them is the node that holds the record, and no collector sees that cycle.
        versions: how often each input had been changed in place when the module was called.
        inputs_packed: True while the inputs are held by hooks for saved tensors (activation checkpointing) and must be unpacked
            before they are used.
        in_output_graph: whether the call was found in the graph of the model's outputs.
        idle: why no gradient is expected, if none is; there is no placement then.
        last_pass: the number of the last backward pass that reached it.
        kept: what the hooked module's ``keep`` returned for the call, which is all that its rule reads.
        training: whether the module was in training mode.
        node_hooks: finds the hooks that run after the node of its output.
    """

    site: HookedModule
    forward: Forward
    inputs: tuple[Any, ...] | None
    kwargs: Mapping[str, Any]
    shape: torch.Size
    placement: Placement | None
    starts_graph: bool
    input_nodes: tuple[Node, ...]
    versions: tuple[int, ...] = ()
    inputs_packed: bool = False
    in_output_graph: bool = False
    idle: Idle | None = None
    last_pass: int | None = None
    kept: Any = None
    training: bool = False
    node_hooks: TableReference = no_table

    def pack_inputs(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
        """Give the inputs to hooks for saved tensors.

        If the record itself held the tensors, they would stay in memory, which checkpointing is there to avoid.
        """
        assert self.inputs is not None
        self.inputs = tuple(_Packed(x, pack, unpack) if isinstance(x, Tensor) else x for x in self.inputs)
        self.kwargs = {k: _Packed(x, pack, unpack) if isinstance(x, Tensor) else x for k, x in self.kwargs.items()}
        self.inputs_packed, self.versions = True, ()
        self.forward.has_packed_inputs = True

    def call(self, grad: Tensor, shared_factors: dict[torch.Size, SharedFactor] | None = None) -> Call:
        """The call as a rule sees it, given the gradient of its output."""
        assert self.placement is not None
        inputs, kwargs = self._arguments()
        grad = grad if grad.shape == self.shape else grad.reshape(self.shape)
        axis = self.placement.axis
        if not axis:
            return Call(inputs, kwargs, grad, current_node(), shared_factors, self.kept, training=self.training)
        first = partial(_first, axis=axis, size=self.shape[axis])
        moved = {k: first(x) for k, x in kwargs.items()}
        found = tuple(map(first, inputs))
        return Call(found, moved, first(grad), kept=self.kept, batch_axis=axis, training=self.training)

    @staticmethod
    def concatenated(records: Sequence[Record], grads: Sequence[Tensor]) -> Call:
        """Several calls as one, which has their samples in turn. Inputs and parameters have the same shapes in all of them."""
        if len(records) == 1:
            return records[0].call(grads[0])
        inputs = (torch.cat([record._arguments()[0][0] for record in records]),)
        grad = torch.cat([grad.reshape(record.shape) for record, grad in zip(records, grads, strict=True)])
        return Call(inputs, {}, grad, training=records[0].training)

    def expanded_to_samples(self, grads: Tensor) -> Call:
        """A call that all samples share, as if each had made it, given the gradients of its output for each, ``[n, ...]``."""
        inputs, kwargs = self._arguments()
        each = partial(_for_each, n=len(grads))
        expanded = {k: each(x) for k, x in kwargs.items()}
        found = tuple(map(each, inputs))
        return Call(found, expanded, grads, kept=self.kept, batch_axis=None, training=self.training)

    def fetch_inputs(self) -> None:
        """Take the inputs back from the hooks that hold them; a checkpoint runs its forward again for that."""
        assert self.inputs is not None
        self.inputs = tuple(_unpacked(x) for x in self.inputs)
        self.kwargs = {name: _unpacked(x) for name, x in self.kwargs.items()}
        self.versions, self.inputs_packed = _versions(self.inputs, self.kwargs), False

    def _arguments(self) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        if self.kept is not None:
            return (), {}
        if self.inputs is None:
            raise CoverageError(f"{self.site}: its inputs are gone, since a backward pass has been here already")
        if self.inputs_packed:
            self.fetch_inputs()
        elif self.versions and _versions(self.inputs, self.kwargs) != self.versions:
            raise CoverageError(
                f"{self.site}: its input was changed in place after the layer saw it; change it out of place"
            )
        # Rules get whole tensors, where ranks compute parts of them and where they are nested.
        kwargs = {name: whole(x) for name, x in self.kwargs.items()} if self.kwargs else self.kwargs
        inputs = self.inputs if set(map(type, self.inputs)) == {Tensor} else tuple(map(whole, self.inputs))
        return inputs, kwargs


class _Packed:
    """A tensor that the hooks for saved tensors keep, and give back once."""

    def __init__(self, value: Tensor, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]):
        self._packed, self._unpack = pack(value), unpack

    def value(self) -> Tensor:
        """The tensor, which the hooks give back."""
        return self._unpack(self._packed)


def _unpacked(value: Any) -> Any:
    return value.value() if isinstance(value, _Packed) else value


def _versions(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """How often each tensor was changed in place so far."""
    found: list[int] = []
    for x in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(x, Tensor) and not x.is_inference():
            found.append(version(x))
    return tuple(found)


def _first(value: Any, axis: int, size: int) -> Any:
    if axis and isinstance(value, Tensor) and value.dim() > axis and value.shape[axis] == size:
        return value.movedim(axis, 0)
    return value


def _for_each(value: Any, n: int) -> Any:
    return value.expand(n, *value.shape) if isinstance(value, Tensor) else value
