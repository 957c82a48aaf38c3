"""One run of the model: what makes the calls of its modules belong to the same samples."""

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

if TYPE_CHECKING:
    from torch_secorder.capture.own_axes import OwnAxis
    from torch_secorder.capture.records import Record


def no_argument() -> None:
    """The reference of what no argument of the model is."""


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
