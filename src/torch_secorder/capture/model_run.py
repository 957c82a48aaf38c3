"""One run of the model, in which all calls of its modules are of the same samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from torch_secorder.autograd.node_hooks import TableReference
from torch_secorder.batch_axis.count import Count, Seen
from torch_secorder.batch_axis.placement import FIRST, Placement
from torch_secorder.batch_axis.told import NOTHING, Told
from torch_secorder.model.containers import Key

if TYPE_CHECKING:
    from torch_secorder.capture.earlier_runs import EarlierRuns
    from torch_secorder.capture.own_axes import OwnAxis
    from torch_secorder.capture.records import Record


def no_argument() -> None:
    """A reference to no argument of the model."""


@dataclass(eq=False, slots=True)
class Forward:
    """One run of the model, in which all calls of its modules are of the same samples.

    Attributes:
        n: how many samples it has; None as long as that is not known.
        calls: how often each parameter's module was called, by the parameter's position in the table.
        input_uses: id of a tensor -> how many calls had it as their first input; it holds as long as such a call has the tensor.
        in_model_call: False for calls of submodules that the user makes outside of any run of the model.
        recomputed_in: the number of the backward pass that runs this forward again (activation checkpointing), or None.
        last_pass: the number of the last backward pass that reached it. It is not noted for submodules that the user calls, and
            for what is run again, where each call notes its own.
        refusal: why its samples can't be counted, to be raised when a backward pass that reaches it is over; None if they can.
        records: its recorded calls so far, each with the place in the graph where its gradient arrives. It is empty once the run
            is over, since a record that holds its own node is a cycle that outlives the graph.
        own_axes: the outputs of modules that have a batch axis of their own; empty once the run is over.
        sharded: the modules that FSDP2 shards, each with a node that made one of its outputs; empty once the run is over.
        count: how many samples it has, and what says so.
        placements: where each of the model's outputs has its samples; empty once the run is over.
        inputs: the model's arguments that count the samples, each with its axis; empty once the run is over.
        counting: finds the argument whose first axis is taken to count the samples; it finds None once nobody has the argument.
        bags: the numbers of bags that EmbeddingBags with offsets made.
        has_packed_inputs: whether hooks for saved tensors keep the inputs of some of its calls (activation checkpointing). Where
            torch does not show which nodes have such hooks, this is the sign that they are in use.
        words: what the user says of where samples are.
        keyed_outputs: lists what the model returned, each tensor with the position or key of the part that has it; nothing once
            the run is over.
        node_hooks: a function for each node at which gradients are taken apart by samples, which finds the hooks that run after
            the node.
        earlier: the runs before it in its thread, which have the same samples; None if these are not followed, and once the run
            is over.
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
    has_packed_inputs: bool = False
    words: Told = NOTHING
    keyed_outputs: Callable[[], list[tuple[Key, Tensor]]] = list
    node_hooks: list[TableReference] = field(default_factory=list)
    earlier: EarlierRuns | None = None

    def settle(self, count: Count) -> None:
        """Take over another count of the samples, which the outputs have shown to be the right one."""
        self.count, self.n = count, count.n
        for record, _ in self.records:
            if record.site.placement is None:
                fits = not record.shape.numel() or FIRST.fits(record.shape, count.n or -1)
                record.placement = FIRST if fits else None
