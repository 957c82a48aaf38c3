"""The uses of parameters that no call of a hooked module accounts for."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from torch.autograd.graph import Node

from torch_secorder.autograd.node_hooks import TableReference, no_table
from torch_secorder.autograd.nodes import any_may_be_packed, may_have_packed_tensors, value_shape
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.batch_axis.search import SampleSearch
from torch_secorder.capture.earlier_runs import EarlierRuns
from torch_secorder.capture.model_run import Forward
from torch_secorder.capture.records import Idle, Record
from torch_secorder.graph.chain import BatchFreeVjp, common_route
from torch_secorder.rules.node_rules import NodeUse, needs_node_call

Target = int | Record  # the position of a parameter, or a module's call without a batch axis


@dataclass(eq=False)
class BatchFreeValue:
    """A value that was computed from parameters alone; several nodes at the frontier may take it.

    Attributes:
        shape: the value's shape.
        targets: everything that the value was computed from, each with the way there.
        key: what the gradients of the nodes that take it are added up under. It holds no node, unlike the ways.
        takers: how many nodes take it.
    """

    shape: tuple[int, ...]
    targets: list[tuple[Target, BatchFreeVjp]]
    key: object = field(default_factory=object)
    takers: int = 0
    _packed: dict[bool, str | None] = field(default_factory=dict)

    @property
    def chains(self) -> list[BatchFreeVjp]:
        """The ways to all targets."""
        return [chain for _, chain in self.targets]

    @property
    def positions(self) -> list[int]:
        """The parameters among the targets."""
        return [target for target, _ in self.targets if isinstance(target, int)]

    @property
    def node(self) -> Node:
        """The node that made it."""
        return self.targets[0][1].value[0]

    @cached_property
    def is_added_up(self) -> bool:
        """Whether the gradients of all nodes that take it are added up before they are pulled back, so that this is done once.

        It is asked when all of these are known. The gradients are kept in the value's shape meanwhile, which is not to take more
        memory than those of what it was computed from.
        """
        computed = [chain for chain in self.chains if chain.permutation is None]
        return (
            self.takers > 1
            and bool(computed)
            and math.prod(self.shape) <= sum(math.prod(chain.shape) for chain in computed)
        )

    def add_target(self, target: Target, way: BatchFreeVjp) -> None:
        """Add something that the value was computed from, too."""
        self.targets.append((target, way))
        self._packed.clear()

    def packed_node(self, supposed: bool) -> str | None:
        """The name of a node on the ways that hooks keep the saved tensors of; where torch shows no hooks, what is supposed."""
        if supposed not in self._packed:
            called = list(self._called())
            found = called if any_may_be_packed(called) else []  # In most steps none has such hooks.
            packed = (node.name() for node in found if may_have_packed_tensors(node, supposed))
            self._packed[supposed] = next(packed, None)
        return self._packed[supposed]

    def _called(self) -> Iterator[Node]:
        """The nodes that have to be called to pull a gradient back."""
        computed = defaultdict(list)
        for chain in self.chains:
            if chain.permutation is None:
                computed[chain.closed].append(chain)
        for chains in computed.values():
            route = common_route(chains)
            yield from (node for node in route.order if node not in route.ends)


class UsedValue(NamedTuple):
    """A batch-free value that a frontier node takes, and which input of the node it is."""

    input_index: int
    value: BatchFreeValue


@dataclass(eq=False)
class ParameterUse:
    """A use of parameters outside of any hooked module's call: a frontier node, where batch-free values meet the data.

    It does not hold its node: the node's hook holds the use, and the two would be a cycle that outlives the graph.

    Attributes:
        forward: the run of the model that the node is of.
        values: the batch-free values that the node takes.
        placement: where the node's output has its samples.
        output: which of its outputs that is.
        is_first: whether everything else that the node takes is batch-free or needs no gradient, so that no
            differentiated node lies before it.
        needs_node_calls: whether its gradients take calls of nodes, once :meth:`note_node_calls` was called. Inside of a
            backward pass that was asked for other gradients only, those give no answer.
        permutes_entries: whether putting its gradients' entries in order takes such calls, as soon as that is noted, too; their
            norms take none.
        last_pass: the last backward pass that reached it.
        node_hooks: finds the hooks that run after its node.
    """

    forward: Forward
    values: list[UsedValue]
    placement: Placement
    output: int
    is_first: bool
    needs_node_calls: bool = False
    permutes_entries: bool = False
    last_pass: int | None = None
    node_hooks: TableReference = no_table

    @property
    def targets(self) -> list[Target]:
        """Everything that the values were computed from."""
        return [target for _, value in self.values for target, _ in value.targets]

    @property
    def ways(self) -> list[tuple[Target, BatchFreeVjp]]:
        """The same, each with the way there."""
        return [way for _, value in self.values for way in value.targets]

    def note_node_calls(self, node: Node) -> None:
        """Find out whether its gradients take calls of nodes, which only passes of the library's own have to know."""
        # The norms of a parameter whose entries are only moved need no way back to it. The rule of a call does: it takes the
        # gradient of the call's own output.
        moves = [(target, vjp.permutation) for target, vjp in self.ways]
        direct = all(p == () or (p is not None and isinstance(target, int)) for target, p in moves)
        self.permutes_entries = any(p != () for _, p in moves)
        self.needs_node_calls = not direct or any(needs_node_call(self.node_use(node, one, {})) for one in self.values)

    def node_use(self, node: Node | None, used: UsedValue, memo: dict[str, Any]) -> NodeUse:
        """One of the values, as its rule sees it."""
        assert node is not None  # a hook of this node runs
        assert self.forward.n is not None
        shape = value_shape(node, self.output)
        return NodeUse(node, used.input_index, used.value.shape, shape, self.placement, self.forward.n, memo)

    def unreadable_because(self, node: Node) -> str | None:
        """The name of a node whose saved tensors only autograd can fetch, and only once, since hooks keep them elsewhere."""
        supposed = self.forward.has_packed_inputs
        if may_have_packed_tensors(node, supposed):
            return node.name()
        return next((name for _, value in self.values if (name := value.packed_node(supposed)) is not None), None)


@dataclass(eq=False)
class IdleUse:
    """A use where no gradient is expected.

    Attributes:
        forward: the run of the model.
        targets: the parameters and calls whose use it is.
        idle: why nothing is expected.
        last_pass: the last backward pass that reached it.
    """

    forward: Forward
    targets: list[Target]
    idle: Idle
    last_pass: int | None = None


class Uses(NamedTuple):
    """The uses of parameters that no record accounts for, each with its node.

    Attributes:
        placed: those whose samples are known.
        idle: those where no gradient is expected.
        search: finds samples in this graph.
    """

    placed: Sequence[tuple[ParameterUse, Node]] = ()
    idle: Sequence[tuple[IdleUse, Node]] = ()
    search: SampleSearch | None = None

    def of_first_run(self, earlier: EarlierRuns) -> Uses:
        """These uses without those that are before several runs of the model for the same samples, and that another run has."""
        return self._replace(placed=[(use, node) for use, node in self.placed if earlier.is_first_use(node)])

    @property
    def added_up(self) -> list[BatchFreeValue]:
        """The values of which the gradients of several nodes are added up."""
        values = dict.fromkeys([value for use, _ in self.placed for _, value in use.values])
        return [value for value in values if value.is_added_up]
