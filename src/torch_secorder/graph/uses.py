"""The uses of parameters that no call of a hooked module accounts for."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.autograd.graph import Node

from torch_secorder.autograd.node_hooks import TableReference, no_table
from torch_secorder.autograd.nodes import may_have_packed_tensors, value_shape
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.batch_axis.search import SampleSearch
from torch_secorder.capture.model_run import Forward
from torch_secorder.capture.records import Idle, Record
from torch_secorder.graph.chain import BatchFreeVjp, common_route
from torch_secorder.rules.node_rules import NodeUse

Target = int | Record  # the position of a parameter, or a module's call without a batch axis


@dataclass(frozen=True)
class UsedValue:
    """A batch-free value that a frontier node takes.

    Attributes:
        index: which input of the node it is.
        shape: the value's shape.
        targets: everything that the value was computed from, each with the way there.
    """

    index: int
    shape: tuple[int, ...]
    targets: list[tuple[Target, BatchFreeVjp]]

    @property
    def chains(self) -> list[BatchFreeVjp]:
        """The ways to all targets."""
        return [chain for _, chain in self.targets]

    def called(self) -> Iterator[Node]:
        """The nodes that have to be called to pull a gradient back."""
        computed = defaultdict(list)
        for chain in self.chains:
            if chain.permutation is None:
                computed[chain.closed].append(chain)
        for chains in computed.values():
            route = common_route(chains)
            yield from (node for node in route.order if node not in route.ends)


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
        needs_node_calls: whether its gradients take calls of nodes. Inside of a backward pass that was asked for other
            gradients only, those give no answer.
        permutes_entries: whether putting its gradients' entries in order takes such calls; their norms take none.
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
        return [target for value in self.values for target, _ in value.targets]

    def node_use(self, node: Node | None, value: UsedValue, memo: dict[str, Any]) -> NodeUse:
        """One of the values, as its rule sees it."""
        assert node is not None  # a hook of this node runs
        assert self.forward.n is not None
        shape = value_shape(node, self.output)
        return NodeUse(node, value.index, value.shape, shape, self.placement, self.forward.n, memo)

    def unreadable_because(self, node: Node) -> str | None:
        """The name of a node whose saved tensors only autograd can fetch, and only once, since hooks keep them elsewhere."""
        for one in (node, *itertools.chain.from_iterable(value.called() for value in self.values)):
            if may_have_packed_tensors(one, self.forward.has_packed_inputs):
                return one.name()
        return None


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
        search: finds samples in this graph, if it also ends in leaves that are not analyzed, of which no use is looked for.
    """

    placed: Sequence[tuple[ParameterUse, Node]] = ()
    idle: Sequence[tuple[IdleUse, Node]] = ()
    search: SampleSearch | None = None
