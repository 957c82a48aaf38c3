"""One traversal of the autograd graph, from the model's outputs to its parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from torch_secorder.autograd.nodes import Edge, output_shapes
from torch_secorder.autograd.saved import axes
from torch_secorder.capture.records import Forward, Record
from torch_secorder.graph.conditions import REORDERS, _reorders, has_ambiguous_axis, size_pattern


class Walk:
    """One traversal of the graph.

    Attributes:
        children: node -> its inputs, for the nodes outside of hooked modules' calls.
        records: nodes at which such a call ends.
        uses: position -> edges (consumer, index of its input) that no call accounts for.
        leaves: where the gradients of parameters are accumulated -> position.
        others: whatever else accumulates gradients: inputs, parameters of other models.
    """

    def __init__(self, roots: Sequence[Tensor], forward: Forward, leaves: dict[Node, int]):
        self.children: dict[Node, Any] = {}
        self.records: dict[Node, list[Record]] = defaultdict(list)
        self.uses: dict[int, list[Edge]] = defaultdict(list)
        ends: dict[Node, list[Record]] = defaultdict(list)
        for record, edge in forward.records:
            if record.site.rule is not None:
                ends[edge.node].append(record)
        self.leaves = leaves
        self.others: list[GradientEdge] = []
        stack = [x.grad_fn for x in roots if x.grad_fn is not None]
        seen = set(stack)
        while stack:
            node = stack.pop()
            found = ends.get(node)
            if found is not None:
                self.records[node] = found
                inputs: Any = self._inside(node, found)
            else:
                inputs = node.next_functions
                if not inputs and hasattr(node, "variable"):
                    self.others.append(GradientEdge(node, 0))
            self.children[node] = inputs
            for index, (child, _) in enumerate(inputs):
                if child is None or child in seen:
                    continue
                if found is None and child in leaves:
                    self.uses[leaves[child]].append((node, index))
                else:
                    seen.add(child)
                    stack.append(child)

    def _inside(self, node: Node, records: list[Record]) -> list[Edge]:
        """What a hooked module's call consumed from outside of it, and the uses of others' parameters inside of it."""
        owned = [position for record in records for position in record.site.parameters.values()]
        boundary = [edge for record in records for edge in record.boundary]
        outside: list[Edge] = []
        stack, seen = [node], {node}
        while stack:
            current = stack.pop()
            for index, (child, nr) in enumerate(current.next_functions):
                if child is None:
                    continue
                if child in boundary:
                    outside.append((child, nr))
                elif (position := self.leaves.get(child)) is not None:
                    if position not in owned:
                        self.uses[position].append((current, index))
                elif child not in seen:
                    seen.add(child)
                    stack.append(child)
        return outside

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The kinds of the nodes, in the order of ``children``."""
        return tuple([node.name() for node in self.children])

    @cached_property
    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        return output_shapes(self.children)

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

    def above(self, nodes: Iterable[Node], levels: int) -> list[Node]:
        """These nodes, and those that consume them in up to so many steps."""
        found = dict.fromkeys(nodes)
        level = list(found)
        for _ in range(levels):
            level = [parent for node in level for parent, _ in self.parents[node] if parent not in found]
            found |= dict.fromkeys(level)
        return list(found)

    def structure(self, n: int | None) -> int:
        """The same for graphs of the same nodes in the same order, whose shapes differ by the names of their sizes only.

        Where shapes prove nothing, their axes are the same too.
        """
        if n is None:
            return hash(self.names)
        along = tuple([axes(node) for node in self.children]) if self.coincidences(n) else None
        return hash((self.names, size_pattern(n, self._shapes), along))

    def reorders(self, n: int) -> bool:
        """Whether some node may put the samples into another order, so that what held for other batches may not hold."""
        if REORDERS.isdisjoint(self.names):
            return False
        return any(
            name in REORDERS and _reorders(node, n) for node, name in zip(self.children, self.names, strict=True)
        )

    def hides(self) -> bool:
        """Whether re-entrant checkpointing hides parts of the graph, so that no evidence can be had."""
        return "CheckpointFunctionBackward" in self.names

    def coincidences(self, n: int) -> bool:
        """Whether any tensor in the graph has n indices on another axis than the first, so that shapes prove nothing."""
        return has_ambiguous_axis(n, self._shapes)
