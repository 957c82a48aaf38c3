"""The frontier: where what was computed from parameters alone meets the data."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch.autograd.graph import GradientEdge, Node

from torch_secorder.autograd.nodes import Edge, has_packed_tensors, output_count, output_shapes, value_shape
from torch_secorder.batch_axis.evidence import Evidence, Unplaced
from torch_secorder.batch_axis.knowledge import Key
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.batch_axis.search import Look, Wanted
from torch_secorder.capture.records import Forward, Record
from torch_secorder.graph.chain import LAYOUT, BatchFreeVjp, between, carrier
from torch_secorder.graph.walk import Walk
from torch_secorder.model.parameters import ParameterTable
from torch_secorder.rules.node_rules import Place, has_rule


@dataclass(frozen=True)
class Part:
    """A batch-free value that a frontier node takes.

    Attributes:
        index: which input of the node it is.
        shape: the value's shape.
        targets: what the value was computed from, each with the way there: the position of a parameter, or the record of a
            module that was called without a batch axis.
    """

    index: int
    shape: tuple[int, ...]
    targets: list[tuple[int | Record, BatchFreeVjp]]


@dataclass(eq=False)
class Use:
    """A frontier node: where batch-free values meet the data, outside of any hooked module's call.

    Attributes:
        parts: the values.
        placement: where the node's output has its samples.
        output: which of its outputs that is.
        starts_graph: whether nothing before the node is differentiated but batch-free values.
        calls_nodes: whether its gradients take calls of nodes, which have no answer inside of a backward pass that was asked
            for other gradients only.
        rearranges: whether its gradients' entries, though not their norms, take such calls.
    """

    forward: Forward
    parts: list[Part]
    placement: Placement
    output: int
    starts_graph: bool
    calls_nodes: bool = False
    rearranges: bool = False
    last_pass: int | None = None

    def place(self, node: Node | None, part: Part, memo: dict[str, Any]) -> Place:
        """One of the values, for its rule."""
        assert node is not None  # a hook of this node runs
        assert self.forward.n is not None
        shape = value_shape(node, self.output)
        return Place(node, part.index, part.shape, shape, self.placement, self.forward.n, memo)

    def hidden(self, node: Node) -> str | None:
        """The name of a node whose saved tensors are elsewhere, and may be fetched only once: by autograd itself."""
        chains = (between(c.value[0], c.start) for part in self.parts for _, c in part.targets if c.layout is None)
        # Where torch does not show it, a call whose inputs such hooks have is a sign of them.
        around = any(record.packed for record, _ in self.forward.records)
        for one in (node, *itertools.chain(*chains)):
            packed = has_packed_tensors(one)
            if packed or (packed is None and around):
                return one.name()
        return None

    def edges(self, node: Node) -> list[GradientEdge]:
        """Where the gradients of the node's outputs arrive."""
        return [GradientEdge(node, nr) for nr in range(output_count(node))]


class Frontier:
    """From unaccounted uses and shared calls up to the nodes where they meet the data."""

    def __init__(
        self, walk: Walk, shared: list[Record], look: Look, n: int, table: ParameterTable, single: bool | None = None
    ):
        self._walk, self._look, self._n, self._table = walk, look, n, table
        self._single = n == 1 if single is None else single  # whether there is one sample, and on every rank
        self._shared = {node: r for node, records in walk.records.items() for r in records if r in shared}
        self._parents = walk.parents

    def uses(self, forward: Forward) -> list[tuple[Use, Node]]:
        """Every frontier use."""
        starts = [
            (*edge, f"{self._table.names[position]}/") for position, edges in self._walk.uses.items() for edge in edges
        ]
        for node, record in self._shared.items():
            starts += [(*edge, f"{record.site.name}()/") for edge in self._parents[node]]
        found: dict[Node, tuple[Placement, int]] = {}
        indices: dict[Node, list[int]] = defaultdict(list)
        done: set[Edge] = set()
        level = starts
        while self._table.ranks.most(bool(level)):
            level = list({item[:2]: item for item in level if item[:2] not in done}.values())
            done |= {item[:2] for item in level}
            following: list[tuple[Node, int, str]] = []
            # What only moves the entries of a batch-free value gives another one; no evidence is needed for that.
            for node, _, path in level:
                if node.name() in LAYOUT and not self._single:
                    following += [(*edge, f"{path}{node.name()}/") for edge in self._parents[node]]
            level = [item for item in level if item[0].name() not in LAYOUT or self._single]
            for (node, index, path), (seen, output) in zip(level, self._evidence(level), strict=True):
                if isinstance(seen, Placement):
                    found[node] = seen, output
                    indices[node].append(index)
                elif seen is Unplaced.SHARED:
                    following += [(*edge, f"{path}{node.name()}/") for edge in self._parents[node]]
            level = following
        return [self._use(forward, node, indices[node], *found[node], set(found)) for node in found]

    def _evidence(self, level: list[tuple[Node, int, str]]) -> list[tuple[Evidence, int]]:
        """For each node the evidence for the first of its outputs that has any, and which that is."""
        if self._single:
            return [(Placement(0, "outer"), 0)] * len(level)
        wanted: list[Wanted] = []
        sizes: list[list[int]] = []
        counts: dict[str, int] = defaultdict(int)
        for node, index, path in level:
            what = f"{path}{node.name()}:{index}"
            counts[what] += 1
            place: Key = ("use", what, counts[what])
            known = self._look.outputs.get(place)
            shapes = output_shapes([node])
            sizes.append(list(range(len(shapes))) if known is None else [known])
            for nr in sizes[-1]:
                wanted.append(((*place, nr), GradientEdge(node, nr), shapes[nr]))
        found, keys = iter(self._look(wanted)), iter(key for key, _, _ in wanted)
        chosen: list[tuple[Evidence, int]] = []
        for outputs in sizes:
            several = [(next(found), nr, next(keys)) for nr in outputs]
            told = [item for item in several if item[0] is not Unplaced.NOTHING]
            best, nr, key = next((item for item in told if isinstance(item[0], Placement)), (told or several)[0])
            if told:
                self._look.outputs[key[:-1]] = nr
            chosen.append((best, nr))
        return chosen

    def _use(
        self, forward: Forward, node: Node, indices: list[int], placement: Placement, output: int, frontier: set[Node]
    ) -> tuple[Use, Node]:
        parts = []
        for index in indices:
            child, nr = node.next_functions[index]
            assert child is not None
            shape = value_shape(child, nr)
            parts.append(Part(index, shape, self._targets(child, nr)))
        others = [c for i, (c, _) in enumerate(node.next_functions) if i not in indices and c is not None]
        use = Use(forward, parts, placement, output, all(self._is_free(c, frontier) for c in others))
        ruled = all(has_rule(use.place(node, part, {})) for part in parts)
        targets = [target for part in parts for target in part.targets]
        use.rearranges = any(c.layout != () for _, c in targets)
        simple = all(c.layout == () or (c.layout is not None and isinstance(target, int)) for target, c in targets)
        use.calls_nodes = not (ruled and simple)
        return use, node

    def _is_free(self, node: Node, frontier: set[Node]) -> bool:
        """Whether a node's value was computed from parameters alone."""
        stack, seen = [node], {node}
        while stack:
            current = stack.pop()
            if current in self._walk.leaves or current in self._shared:
                continue
            if current in self._walk.records or current in frontier or not current.next_functions:
                return False
            for child, _ in current.next_functions:
                if child is not None and child not in seen:
                    seen.add(child)
                    stack.append(child)
        return True

    def _targets(self, value: Node, nr: int) -> list[tuple[int | Record, BatchFreeVjp]]:
        """Everything that a batch-free value was computed from."""
        leaves = self._walk.leaves
        ends: dict[Node, int | Record] = {}
        stack, seen = [value], {value}
        while stack:
            node = stack.pop()
            if node in leaves:
                ends[node] = leaves[node]
            elif node in self._shared:
                ends[node] = self._shared[node]
            else:
                for child, _ in node.next_functions:
                    if child is not None and child not in seen:
                        seen.add(child)
                        stack.append(child)
        return [(target, carrier((value, nr), node, self._shape_of(target))) for node, target in ends.items()]

    def _shape_of(self, target: int | Record) -> tuple[int, ...]:
        return self._table.rows[target].shape if isinstance(target, int) else tuple(target.shape)
