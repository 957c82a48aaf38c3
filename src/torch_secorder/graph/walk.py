"""The walk: one traversal of the autograd graph, from the model's outputs to its parameters."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Container, Hashable, Iterable, Sequence
from functools import cached_property
from operator import attrgetter
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

from torch_secorder.autograd.kept_values import kept_values
from torch_secorder.autograd.nodes import Edge, is_checkpoint, output_shapes
from torch_secorder.autograd.saved import axes_of_each
from torch_secorder.batch_axis.moving import MOVES
from torch_secorder.capture.model_run import Forward
from torch_secorder.capture.records import Record
from torch_secorder.graph.carried_axes import ATTENDS, UNFIT, CarriedAxis
from torch_secorder.graph.earlier_nodes import nodes_of_runs
from torch_secorder.graph.sizes import SizePattern, size_pattern


class Walk:
    """What one traversal of a forward's graph has met.

    A hooked module's call counts as one node: the one that made its output. What the call computed inside is only searched
    for parameters that are not the module's own.

    Attributes:
        nodes: the nodes, in the order in which the walk met them.
        calls: the calls that the outputs lead to, with where their outputs' gradients arrive, in the order in which the walk met
            them: a loop over samples may make the same graph in another order each time.
        records: node that made a hooked call's output -> the calls that end there.
        unfolded: calls that count as the nodes that they consist of.
        uses: position of a parameter -> its uses that no call accounts for, as edges (consumer, index of the input).
        leaves: node that accumulates an analyzed parameter's gradient -> the parameter's position.
        n: how many samples the forward has; None if nobody knows.
        other_leaves: the nodes that accumulate gradients of other tensors: inputs, parameters that are not analyzed.
        fingerprint: a hash of the graph, equal for graphs with the same nodes in the same order, the same pattern of sizes, the
            same axes of those nodes that move entries, and the same values that Python functions keep. Where sizes prove nothing,
            the axes of all nodes are hashed.
        kind: a hash of the nodes' names alone, equal for graphs of which a router sends other numbers of rows elsewhere.
        ingredients: a hash of what kinds of nodes there are; equal also where an expert that got no row has fewer of them.
        has_ambiguous_axis: whether some tensor has n indices on another axis than the first, so that sizes prove nothing.
        carried_axes: the axes along which some node carries something from one index to the next.
        checkpoints: the nodes of re-entrant checkpoints that can be watched.
        shapes: the shapes of all nodes' outputs, in turn.

    What an earlier run of the model has made for the same samples is no part of the graph.
    """

    def __init__(
        self, roots: Sequence[Tensor], forward: Forward, leaves: dict[Node, int], unfolded: Iterable[Record] = ()
    ):
        self.nodes: dict[Node, None] = {}
        self.records: dict[Node, list[Record]] = {}
        self.uses: dict[int, list[Edge]] = defaultdict(list)
        self.leaves, self.n = leaves, forward.n
        self.unfolded = set(unfolded)
        self.other_leaves: list[Node] = []
        self._taken: dict[Node, list[Edge]] = {}  # node that made a hooked call's output -> what the call took
        self._inside: dict[Node, None] = {}  # the nodes that hooked calls consist of
        calls: dict[Node, list[Record]] = defaultdict(list)
        edges: dict[Record, GradientEdge] = {}
        for record, edge in forward.records:
            if record.site.rule is not None and record not in self.unfolded:
                calls[edge.node].append(record)
                edges[record] = edge
        self._traverse(roots, calls, nodes_of_runs(roots, forward.earlier.runs) if forward.earlier is not None else ())
        self.calls = [
            (record, edges[record])
            for node in self.nodes
            if node in calls
            for record in calls[node]
            if record not in self.unfolded
        ]
        self._describe(forward.n)

    def _traverse(self, roots: Sequence[Tensor], calls: dict[Node, list[Record]], ends: Collection[Node]) -> None:
        # Every step walks its graph, which is why this is one loop without a function for each node. One node may have made
        # several of the roots.
        stack: list[Any] = list(dict.fromkeys(filter(None, map(attrgetter("grad_fn"), roots))))
        if ends:  # A root of these is an argument that the model returns as it is.
            self.nodes = {node: None for node in stack if node in ends}
            self._taken = {node: [] for node in self.nodes}
            stack = [node for node in stack if node not in ends]
        seen, nodes, leaves = {*stack, *ends}, self.nodes, self.leaves
        while stack:
            node = stack.pop()
            nodes[node] = None
            ending = calls.get(node)
            inputs: Any = None if ending is None else self._inputs_of_call(node, ending)
            if inputs is not None and ending is not None:
                self.records[node], self._taken[node] = ending, inputs
            else:
                ending, inputs = None, node.next_functions
                if not inputs and hasattr(node, "variable"):
                    self.other_leaves.append(node)
            for index, (child, _) in enumerate(inputs):
                if child is None or child in seen:
                    continue
                if ending is None and child in leaves:
                    self.uses[leaves[child]].append((node, index))
                else:
                    seen.add(child)
                    stack.append(child)

    def _inputs_of_call(self, node: Node, records: list[Record]) -> list[Edge] | None:
        """What a hooked call took from outside. Uses of parameters inside of it that its module doesn't own are noted.

        It is None for a module that returns its input as it is, since the node is not the module's then, and for one whose input
        is a parameter, since that parameter has a gradient of its own for every sample.
        """
        computing = [record for record in records if node not in record.input_nodes]
        if not computing:
            return None
        leaves, boundary = self.leaves, set(computing[0].input_nodes)
        owned: Container[int] = computing[0].site.positions
        if len(computing) > 1:
            boundary.update(*[record.input_nodes for record in computing])
            owned = {position for record in computing for position in record.site.positions}
        if not leaves.keys().isdisjoint(boundary):
            self.unfolded.update(records)
            return None
        outside: list[Edge] = []
        stack, seen = [node], dict.fromkeys([node])
        while stack:
            current = stack.pop()
            for index, (child, nr) in enumerate(current.next_functions):
                if child is None:
                    continue
                if child in boundary:
                    outside.append((child, nr))
                elif (position := leaves.get(child)) is not None:
                    if position not in owned:
                        self.uses[position].append((current, index))
                elif child not in seen:
                    seen[child] = None
                    stack.append(child)
        self._inside.update(seen)
        return outside

    def _describe(self, n: int | None) -> None:
        nodes: Iterable[Any] = itertools.chain(self.nodes, self._inside)
        # Every step asks this of each node.
        functions = [node for node in nodes if isinstance(node, BackwardCFunction)]
        names, self.shapes = tuple([node.name() for node in self.nodes]), output_shapes(self.nodes)
        pattern = SizePattern(False, None) if n is None else size_pattern(n, self.shapes)
        self.has_ambiguous_axis = pattern.is_ambiguous
        # Only a size that is met twice lets positions pass for samples.
        kinds = UNFIT | ATTENDS if self.has_ambiguous_axis else UNFIT
        self.carried_axes = [] if kinds.isdisjoint(names) else self._carried_axes(names, kinds)
        moves = self.has_ambiguous_axis or not MOVES.isdisjoint(names)
        along = axes_of_each(self.nodes if self.has_ambiguous_axis else self._movers(names)) if moves else ()
        self.kind, self.ingredients = hash(names), hash(frozenset(names))
        kept = kept_values(functions, n) if functions else None
        self.checkpoints: list[Any] = [node for node in functions if is_checkpoint(node)] if functions else []
        self.fingerprint = hash((names, pattern, along, kept))

    @cached_property
    def layout(self) -> int:
        """A hash of the nodes' names and axes, equal for graphs of batches of any size."""
        return hash((tuple([node.name() for node in self.nodes]), axes_of_each(self.nodes)))

    @cached_property
    def children(self) -> dict[Node, Any]:
        """Node -> its inputs, in the order in which the walk met the nodes. Most steps ask for none."""
        return {node: self._taken.get(node, node.next_functions) for node in self.nodes}

    @property
    def numbered(self) -> list[Node]:
        """The nodes outside of hooked calls and those that calls consist of, in the order in which the walk met them."""
        return [*self.nodes, *(node for node in self._inside if node not in self.nodes)]

    @property
    def wiring(self) -> Hashable:
        """For each node in turn, which outputs of which others it takes."""
        # A steady step may ask for it, so that no tuple is made for each node.
        numbers, taken = {node: number for number, node in enumerate(self.nodes)}, list(self.children.values())
        makers = [numbers.get(node) for inputs in taken for node, _ in inputs]
        return tuple(map(len, taken)), tuple(makers), tuple([nr for inputs in taken for _, nr in inputs])

    def _movers(self, names: Sequence[str]) -> list[Node]:
        """The nodes outside of hooked calls that put entries where an index or a setting says."""
        pairs = zip(self.nodes, names, strict=True)
        return [node for node, name in pairs if name in MOVES and node not in self.records]

    def _carried_axes(self, names: Sequence[str], kinds: set[str]) -> list[CarriedAxis]:
        pairs = zip(self.nodes, names, strict=True)
        found = [CarriedAxis.of(node, self.n) for node, name in pairs if name in kinds and node not in self.records]
        return [one for one in found if one is not None]

    @cached_property
    def parents(self) -> dict[Node, list[Edge]]:
        """Node -> its consumers outside of hooked modules' calls, each with the index of its input."""
        found: dict[Node, list[Edge]] = defaultdict(list)
        for node, inputs in self.children.items():
            if node not in self.records:
                for index, (child, _) in enumerate(inputs):
                    if child is not None:
                        found[child].append((node, index))
        return found

    @cached_property
    def inside_calls(self) -> set[Node]:
        """The nodes that hooked calls consist of. Others may use some of them too, since autocast casts a weight once for all."""
        return set(self._inside)

    def above(self, nodes: Iterable[Node], levels: int) -> list[Node]:
        """These nodes, and those that consume them in up to so many steps."""
        found = dict.fromkeys(nodes)
        level = list(found)
        for _ in range(levels):
            level = [parent for node in level for parent, _ in self.parents[node] if parent not in found]
            found |= dict.fromkeys(level)
        return list(found)
