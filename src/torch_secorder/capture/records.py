"""What is kept of one call of a module between its forward and its backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from torch_secorder.autograd.engine import current_node
from torch_secorder.autograd.node_hooks import TableReference, no_table
from torch_secorder.autograd.versions import version
from torch_secorder.batch_axis.count import Count, Seen
from torch_secorder.batch_axis.evidence import Unplaced
from torch_secorder.batch_axis.placement import FIRST, Layout, Placement
from torch_secorder.errors import CoverageError, CurvatureError, ShapeError
from torch_secorder.model.nested import whole
from torch_secorder.model.ranks import class_as_written
from torch_secorder.per_sample import PerSampleGradient, SharedFactor


@dataclass(frozen=True)
class Idle:
    """Something for which no gradient is expected: a look found none, or only such as belongs to several samples at once.

    Attributes:
        why: what the look found.
        forget: forgets that, so that the next graph of its kind is looked through.
    """

    why: Unplaced
    forget: Callable[[], object]


def no_argument() -> None:
    """The reference of what no argument of the model is."""


@dataclass(frozen=True)
class OwnAxis:
    """The output of a module that has a batch axis of its own: what goes along the other axis belongs together.

    Attributes:
        name: the module's.
        module: the module.
        axis: its batch axis; None where it was called on one sample without such an axis.
        shape: the output's, ``[batch, steps, features]``, ``[steps, batch, features]`` or ``[steps, features]``.
        edge: where the output's gradient arrives.
    """

    name: str
    module: nn.Module
    axis: int | None
    shape: torch.Size
    edge: GradientEdge

    def contradicts_shapes(self, n: int) -> bool:
        """Whether there are n steps, and not a multiple of n samples."""
        if self.axis is None:
            return self.shape[0] == n > 1
        return self.shape[1 - self.axis] == n and self.shape[self.axis] % n != 0

    def contradicts(self, found: Placement) -> bool:
        """Whether samples that were found there are the module's steps."""
        if self.axis is None:  # All steps may be one sample's, in a loop over samples.
            return found.axis == 0 and found.layout is Layout.ONE_EACH
        return found.axis == 1 - self.axis

    def refusal(self, n: int) -> ShapeError:
        """The refusal of samples that are on another axis."""
        kind, first = class_as_written(self.module).__name__, bool(getattr(self.module, "batch_first", False))
        if self.axis is None:
            return without_batch_axis(f"{kind} '{self.name}'", f"an output of shape {tuple(self.shape)}", n)
        return ShapeError(
            f"{kind} '{self.name}' has its batch on axis {self.axis} (batch_first={first}), its steps on axis {1 - self.axis}, "
            f"where the model's {n} samples would be: if the model's inputs have their samples there, pass "
            f"batch_axis={self.axis}, or batch_axis={{'inputs': {self.axis}}} if its outputs have them first; or make the module "
            f"with batch_first={not first}"
        )


@dataclass(eq=False, slots=True)
class Forward:
    """One run of the model: what makes the calls of its modules belong to the same samples.

    Attributes:
        n: its batch size, None as long as nobody knows.
        calls: how often each parameter's module was called, by position in the parameter table.
        input_uses: how often each tensor was a call's first input, by its id while such a call has it.
        in_model_call: False for calls of submodules with no call of the model around them.
        recomputed_in: the backward pass that runs this forward again (activation checkpointing), or None.
        last_pass: the last backward pass that reached it, if the model's call shows which passes do.
        refusal: what can't be right about it, for the end of the pass.
        records: its calls so far, each with the place in the graph where its gradient arrives; empty once it is over, since a
            record that holds its own node is a cycle that outlives the graph.
        own_axes: the outputs of modules that have a batch axis of their own; empty once the run is over.
        node_hooks: each finds the hooks that run after a node at which gradients are taken apart by samples.
        sharded: the modules that FSDP2 shards, each with a node that made one of its outputs; empty once the run is over.
        count: what says how many samples it has.
        placements: where each of the model's outputs has its samples; empty once the run is over.
        inputs: the model's arguments of which more than one axis may count the samples, each with the axis that is taken to;
            empty once the run is over.
        counting: finds the argument whose first axis is taken to count the samples, as long as somebody has it.
        bags: how many bags the EmbeddingBags with offsets made.
    """

    n: int | None = None
    calls: Counter[int] = field(default_factory=Counter)
    input_uses: dict[int, int] = field(default_factory=dict)
    in_model_call: bool = True
    recomputed_in: int | None = None
    last_pass: int | None = None
    refusal: Exception | None = None
    records: list[tuple[Record, GradientEdge]] = field(default_factory=list)
    sharded: list[tuple[nn.Module, Node]] = field(default_factory=list)
    own_axes: list[OwnAxis] = field(default_factory=list)
    count: Count = field(default_factory=Count)
    placements: Sequence[Placement | None] = ()
    inputs: list[tuple[Seen, Tensor]] = field(default_factory=list)
    counting: Callable[[], Tensor | None] = no_argument
    bags: set[int] = field(default_factory=set)
    node_hooks: list[TableReference] = field(default_factory=list)

    def settle(self, count: Count) -> None:
        """The outputs show that this is how many samples there are."""
        self.count, self.n = count, count.n
        for record, _ in self.records:
            if record.site.placement is None:
                fits = not record.shape.numel() or FIRST.fits(record.shape, count.n or -1)
                record.placement = FIRST if fits else None


@dataclass(frozen=True, eq=False)
class HookedModule:
    """A hooked module, with what is decided once for all of its calls.

    Attributes:
        parameters: local name -> position in the parameter table.
        tensors: local name -> the parameter, to notice when somebody replaced it.
        shapes: local name -> the parameter's shape.
        rule: from a :class:`Call` to per-sample gradients; this floor only carries it. None where only the output
            itself is of interest.
        placement: where its outputs have their samples; None to find out.
        keep: for a module whose rule needs something else than its inputs, what to keep of a call, from ``(module, args, kwargs,
            output)``; None for one whose rule needs the inputs.
        number: its place among the model's modules, for tables in their order.
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

    def __str__(self) -> str:
        return f"{self.kind} '{self.name}'"

    @property
    def kind(self) -> str:
        """The name of the module's class."""
        return class_as_written(self.module).__name__

    @cached_property
    def positions(self) -> tuple[int, ...]:
        """Those of its parameters."""
        return tuple(self.parameters.values())

    def forms(self, call: Call) -> dict[str, PerSampleGradient]:
        """What the rule says of a call: local name -> per-sample gradient.

        Raises:
            CurvatureError: as the rule, naming the module.
        """
        try:
            found: dict[str, PerSampleGradient] = self.rule(self.module, call, self.shapes)
        except CurvatureError as error:
            raise type(error)(f"{self}: {error}") from error
        return found


# Layers whose output has the same axes as their input, but for the last axis.
KEEPS_AXES = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.PReLU)

# Calls with fewer elements are batched before anything is computed: starting an operation costs as much as reading these.
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
        """``value``, a view of the input, as something whose Gram matrix is computed once for all calls with this input."""
        if self.shared_factors is None:
            return value
        found = self.shared_factors.get(value.shape)
        # Tensors are compared by address and stride, not by id: the one that is there keeps its memory in use, so that equal
        # addresses mean the same data.
        if found is None or (found.value.data_ptr(), found.value.stride()) != (value.data_ptr(), value.stride()):
            found = self.shared_factors[value.shape] = SharedFactor(value)
        return found

    def argument(self, position: int, name: str) -> Any:
        """An argument that callers may pass by position or by name."""
        return self.inputs[position] if len(self.inputs) > position else self.kwargs[name]


@dataclass(eq=False, slots=True)
class Record:
    """A call between its forward and its backward.

    Attributes:
        shape: the output's; a nested one's as it is padded.
        placement: where the output has its samples; None while that is not known, and for a call without a batch axis.
        idle: why there is no placement, where no gradient is expected.
        in_output_graph: whether the graph of the model's outputs was seen to contain it.
        starts_graph: whether no input requires a gradient, so that nothing before this call is differentiated.
        input_nodes: the nodes that made the inputs, as long as the run of the model lasts: a module that returns its input would
            make a cycle of them and of its node, which holds the record, that no collector sees.
        versions: how often each input had been changed in place when the module saw it.
        inputs_packed: True while the inputs are held by hooks for saved tensors (activation checkpointing) and must be unpacked
            before they are used.
        last_pass: the last backward pass that reached it.
        kept: what the hooked module's ``keep`` took of the call.
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
        """Leave the inputs to hooks for saved tensors.

        Tensors that we kept ourselves would stay in memory, which is what checkpointing is there to avoid.
        """
        assert self.inputs is not None
        self.inputs = tuple(_Packed(x, pack, unpack) if isinstance(x, Tensor) else x for x in self.inputs)
        self.kwargs = {k: _Packed(x, pack, unpack) if isinstance(x, Tensor) else x for k, x in self.kwargs.items()}
        self.inputs_packed, self.versions = True, ()

    def call(self, grad: Tensor, shared_factors: dict[torch.Size, SharedFactor] | None = None) -> Call:
        """What the rule needs, with the axis that counts samples first."""
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
        """Calls with the same inputs' and parameters' shapes as one call of all of their samples in turn."""
        if len(records) == 1:
            return records[0].call(grads[0])
        inputs = (torch.cat([record._arguments()[0][0] for record in records]),)
        return Call(inputs, {}, torch.cat(list(grads)), training=records[0].training)

    def expanded_to_samples(self, grads: Tensor) -> Call:
        """A call without a batch axis as one for every sample, given the gradient of its output for each, ``[n, ...]``."""
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
        """The tensor."""
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


# Layers, with how many axes the input has that is one sample without a batch axis.
SIDES_OF_ONE: tuple[tuple[tuple[type[nn.Module], ...], int], ...] = (
    ((nn.Linear,), 1),
    ((nn.Conv1d, nn.ConvTranspose1d), 2),
    ((nn.Conv2d, nn.ConvTranspose2d), 3),
    ((nn.Conv3d, nn.ConvTranspose3d), 4),
)


def takes_for_one_sample(record: Record, argument: Tensor) -> bool:
    """Whether a layer got an argument of the model, whose first axis is taken to count samples, as one sample."""
    x = record.inputs[0] if record.inputs else None
    if type(x) is not Tensor or type(argument) is not Tensor or x.shape != argument.shape:
        return False
    sides = next((sides for kinds, sides in SIDES_OF_ONE if isinstance(record.site.module, kinds)), None)
    return x.dim() == sides and x.untyped_storage().data_ptr() == argument.untyped_storage().data_ptr()


def without_batch_axis(what: str, seen: str, n: int) -> ShapeError:
    """The refusal of a call of the model on one sample, whose first axis counts something else."""
    return ShapeError(
        f"{what} was called without a batch axis ({seen}), where axis 0 would count the model's {n} samples: pass the model one "
        "sample as a batch of one (x[None]), or pass n_samples=1"
    )


def contradicted_axis(record: Record, argument: Tensor, axis: int) -> int | None:
    """The axis of an argument of the model along which a layer that got it has the samples, if not the given one.

    Layers of torch's that keep the axes of their input have the samples where their input has them.

    Args:
        record: the layer's call, with its placement.
        argument: the model's, with as many indices on several axes as there are samples.
        axis: where it is taken to have the samples.
    """
    x, placement, n = record.inputs[0] if record.inputs else None, record.placement, argument.shape[axis]
    if type(x) is not Tensor or type(argument) is not Tensor or not isinstance(record.site.module, KEEPS_AXES):
        return None
    if placement is None or placement.layout is not Layout.ONE_EACH:
        return None
    if x.untyped_storage().data_ptr() != argument.untyped_storage().data_ptr():
        return None
    sides = min(x.dim(), len(record.shape))
    if x.dim() != argument.dim() or placement.axis >= sides or x.shape[placement.axis] != n:
        return None
    # The layer may have got the argument transposed: its axes are told by their strides.
    ways = [(size, stride) for size, stride in zip(argument.shape, argument.stride(), strict=True)]
    own = (x.shape[placement.axis], x.stride(placement.axis))
    if own not in ways or ways.count(own) > 1 or ways[axis] == own:
        return None
    return ways.index(own)
