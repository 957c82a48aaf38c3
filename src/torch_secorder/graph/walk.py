"""One traversal of the autograd graph, from the model's outputs to its parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from torch_secorder.graph.chain import Edge
from torch_secorder.parameters import ParameterTable
from torch_secorder.records import Forward, Record
from torch_secorder.trees import tensors

REORDERS = {
    f"{name}Backward0"
    for name in [
        "Index",
        "IndexSelect",
        "Flip",
        "Roll",
        "Gather",
        "IndexPut",
        "IndexAdd",
        "Scatter",
        "ScatterAdd",
        "Sort",
    ]
}


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
        return tuple([tuple(meta.shape) for node in self.children for meta in node._input_metadata])

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
        axes = tuple([_axes(node) for node in self.children]) if self.coincidences(n) else None
        return hash((self.names, _pattern(n, self._shapes), axes))

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
        return _coincides(n, self._shapes)


# (Step after step has the same shapes.)
@lru_cache(64)
def _pattern(n: int, shapes: tuple[tuple[int, ...], ...]) -> int:
    """Of shapes with each size as the number of different ones before it."""
    sizes = {n: 0}
    return hash(tuple([tuple([sizes.setdefault(size, len(sizes)) for size in shape]) for shape in shapes]))


@lru_cache(64)
def _coincides(n: int, shapes: tuple[tuple[int, ...], ...]) -> bool:
    return any(n in shape[1:] for shape in set(shapes))


def _axes(node: Any) -> tuple[str, ...]:
    """The axes that a node works along, as far as it saved any."""
    kinds = _axis_names(type(node))  # type: ignore[arg-type]  # a type is hashable
    return tuple([str(getattr(node, name)) for name in kinds]) if kinds else ()


@cache
def _axis_names(kind: type) -> list[str]:
    return [name for name in ("_saved_dim", "_saved_dims", "_saved_dim0", "_saved_dim1") if hasattr(kind, name)]


# What has no second derivative, and what does the same and has one.
ONCE = {
    "ScaledDotProduct": "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)",
    "CudnnRnn": "torch.backends.cudnn.flags(enabled=False)",
    "MiopenRnn": "torch.backends.cudnn.flags(enabled=False)",
}


def without_second_derivative(outputs: Any, table: ParameterTable) -> tuple[str, str] | None:
    """A node that can't be differentiated twice and the parameter nearest to it, in words; and the remedy."""
    for node in _before([x.grad_fn for x in tensors(outputs)]):
        remedy = next((remedy for name, remedy in ONCE.items() if node.name().startswith(name)), None)
        if remedy is None or "Math" in node.name():
            continue
        positions = (table.position(getattr(one, "variable", None)) for one in _before([node]))
        nearest = next((f" at {table.names[position]}" for position in positions if position is not None), "")
        return f"{node.name()}{nearest}", remedy
    return None


def _before(nodes: Sequence[Node | None]) -> Iterator[Node]:
    """These nodes and whatever they were computed from, the nearest first."""
    level = list(dict.fromkeys(node for node in nodes if node is not None))
    seen = set(level)
    while level:
        yield from level
        level = list(
            dict.fromkeys(c for node in level for c, _ in node.next_functions if c is not None and c not in seen)
        )
        seen.update(level)


def _reorders(node: Any, n: int) -> bool:
    """Whether a node that picks entries does so on the first axis, in another order than the given one."""
    name = node.name()
    if name == "FlipBackward0":
        return any(axis % len(node._input_metadata[0].shape) == 0 for axis in node._saved_dims)
    if name == "IndexBackward0":
        first = node._saved_indices[0]
        return first is not None and not _in_order(first, n)
    if name == "IndexSelectBackward0":
        return node._saved_dim == 0 and not _in_order(node._saved_index, n)
    return True


def _in_order(index: Tensor, n: int) -> bool:
    return index.shape == (n,) and bool((index == torch.arange(n, device=index.device)).all())


def used_by_loss(loss: Tensor, outputs: Any, table: ParameterTable) -> list[str]:
    """The parameters that a loss uses by another way than through the model's outputs: weight penalties, for one."""
    stop = {x.grad_fn for x in tensors(outputs) if x.grad_fn is not None}
    found: dict[str, None] = {}
    stack: list[Node | None] = [loss.grad_fn]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node is None or node in stop:
            continue
        if (position := table.position(getattr(node, "variable", None))) is not None:
            found[table.names[position]] = None
        for child, _ in node.next_functions:
            if child not in seen:
                seen.add(child)
                stack.append(child)
    return list(found)
