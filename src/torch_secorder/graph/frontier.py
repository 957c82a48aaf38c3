"""The frontier: where what was computed from parameters alone meets the data."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from torch.autograd.graph import GradientEdge, Node

from torch_secorder.autograd.nodes import Edge, output_shapes, value_shape
from torch_secorder.autograd.opaque import runs_others_code
from torch_secorder.batch_axis.evidence import SILENT, Evidence, Unplaced
from torch_secorder.batch_axis.knowledge import Key, Wanted
from torch_secorder.batch_axis.placement import Layout, Placement
from torch_secorder.batch_axis.search import SampleSearch
from torch_secorder.capture.model_run import Forward
from torch_secorder.capture.records import Idle, Record
from torch_secorder.graph.chain import PERMUTES_ENTRIES, BatchFreeVjp, batch_free_vjp
from torch_secorder.graph.refusals import hidden
from torch_secorder.graph.uses import BatchFreeValue, IdleUse, ParameterUse, Target, UsedValue
from torch_secorder.graph.walk import Walk
from torch_secorder.model.parameters import Table


class Consumer(NamedTuple):
    """A node that takes a batch-free value.

    Attributes:
        node: the node.
        input_index: which of its inputs the value is.
        path: the way from the parameter or call to the node, in words that are the same in later graphs.
    """

    node: Node
    input_index: int
    path: str

    @property
    def edge(self) -> Edge:
        """What tells it from other consumers in one graph."""
        return self.node, self.input_index


class Frontier:
    """Climbs from parameters and from calls without a batch axis to the nodes where they meet the data.

    Args:
        walk: through the graph.
        shared: the calls without a batch axis, whose outputs all samples share.
        search: finds out where tensors in this graph have their samples.
        table: the analyzed parameters.
        one_sample: whether there is one sample, on every rank, so that all of each tensor is that sample's.

    Attributes:
        batch_free: the nodes that turned out to have been computed from parameters alone, besides the parameters' own.
    """

    def __init__(self, walk: Walk, shared: list[Record], search: SampleSearch, table: Table, *, one_sample: bool):
        self._walk, self._search, self._table, self._one_sample = walk, search, table, one_sample
        self._shared = {node: r for node, records in walk.records.items() for r in records if r in shared}
        self._targets: dict[Node, Target] = {**self._shared, **walk.leaves}
        self.batch_free = set(self._shared)
        self._parents = walk.parents
        # Consumer -> the nodes of the parameters and calls from which it was reached.
        self._origins: dict[Edge, set[Node]] = defaultdict(set)
        # Consumer -> the consumers of its output, to which the climb went on.
        self._climbs: dict[Edge, list[Edge]] = {}
        # The nodes at the frontier, and with them those from which the climbs began.
        self._frontier, self._ends = set[Node](), set[Node]()
        # What was found of a value, for all nodes that take it.
        self._values: dict[tuple[Node, int, frozenset[Node]], BatchFreeValue] = {}

    def uses(self, forward: Forward) -> tuple[list[tuple[ParameterUse, Node]], list[tuple[IdleUse, Node]]]:
        """Every use at the frontier, and those where no gradient is expected, each with its node."""
        met: dict[Node, tuple[Placement, int]] = {}
        indices: dict[Node, list[int]] = defaultdict(list)
        idle: list[tuple[Consumer, Idle]] = []
        for consumer, found, output in self._placed():
            if isinstance(found, Placement):
                met[consumer.node] = found, output
                indices[consumer.node].append(consumer.input_index)
            else:
                idle.append((consumer, found))
        self._frontier = set(met)
        # Gradients that go through these nodes are accounted for at these nodes.
        self._closed = self._frontier.union(
            node for node, records in self._walk.records.items() if any(r.placement is not None for r in records)
        )
        self._ends = self._targets.keys() | self._closed
        uses = [(self._use(forward, node, indices[node], *met[node]), node) for node in met]
        return uses, [(IdleUse(forward, self._origin_targets(one.edge), why), one.node) for one, why in idle]

    def _origin_targets(self, edge: Edge) -> list[Target]:
        return [self._targets[node] for node in self._origins[edge]]

    def _placed(self) -> Iterator[tuple[Consumer, Placement | Idle, int]]:
        """The consumers whose output has samples, level by level, and which of their outputs that is.

        With them come the consumers of which nothing shows whether they have samples, since no gradient arrives there, and those
        all of whose own consumers belong to several samples at once.
        """
        level, done = self._starts(), set[Edge]()
        ranks = self._table.ranks
        while ranks.max_over_ranks(bool(level)) if ranks.distributed else level:
            level = list({item.edge: item for item in level if item.edge not in done}.values())
            done.update(item.edge for item in level)
            # A function that calls modules in its backward is left out. The backward passes that it starts bring its gradients to
            # the hooks of those modules.
            level = [item for item in level if not runs_others_code(item.node)]
            moving = [item for item in level if self._is_batch_free(item)]
            others = [item for item in level if not self._is_batch_free(item)]
            level = []
            for item in moving:
                if above := self._above(item):
                    level += above
                else:
                    yield item, Idle(Unplaced.SHARED_BY_SAMPLES, partial(self._forget, item)), 0
            for item, (found, output) in zip(others, self._evidence(others), strict=True):
                if isinstance(found, Placement):
                    yield item, found, output
                elif found in SILENT or found is Unplaced.NOT_FINITE:
                    yield item, Idle(found, partial(self._forget, item)), output
                elif found is Unplaced.HIDDEN:
                    raise hidden(f"{item.path.partition('/')[0]}: {item.node.name()}", self._walk.n)
                elif above := self._above(item):
                    level += above
                else:
                    yield item, Idle(found, partial(self._forget, item)), output

    def _is_batch_free(self, item: Consumer) -> bool:
        """Whether a consumer gives another batch-free value, for which no evidence is needed.

        A node that only moves the entries of such a value does. Where there is one sample, all of each tensor belongs to it, and
        nothing has to be climbed. The exception is a value that a hooked call uses too, such as a weight that autocast has cast
        once: its gradient has a part from that call, which the call's rule counts, so that its other consumers are taken.
        """
        if self._one_sample:
            return item.node in self._walk.inside_calls and bool(self._parents[item.node])
        return item.node.name() in PERMUTES_ENTRIES

    def _starts(self) -> list[Consumer]:
        """What takes a parameter outside of its module's call, or the output of a call without a batch axis."""
        names, uses = self._table.names, self._walk.uses
        leaves = {position: node for node, position in self._walk.leaves.items()}
        starts = [
            (leaves[position], Consumer(*edge, f"{names[position]}/"))
            for position, edges in uses.items()
            for edge in edges
        ]
        for node, record in self._shared.items():
            starts += [(node, Consumer(*edge, f"{record.site.name}()/")) for edge in self._parents[node]]
        for node, consumer in starts:
            self._add_origins(consumer.edge, {node})
        return [consumer for _, consumer in starts]

    def _above(self, item: Consumer) -> list[Consumer]:
        """What takes the output of a consumer that turned out to be batch-free itself."""
        self.batch_free.add(item.node)
        path = f"{item.path}{item.node.name()}/"
        above = [Consumer(*edge, path) for edge in self._parents[item.node]]
        self._climbs[item.edge] = [consumer.edge for consumer in above]
        for consumer in above:
            self._add_origins(consumer.edge, self._origins[item.edge])
        return above

    def _add_origins(self, edge: Edge, origins: set[Node]) -> None:
        """Note from which parameters and calls a consumer is reached, and with it all that it was left for."""
        stack = [edge]
        while stack:
            current = stack.pop()
            known = self._origins[current]
            if not origins <= known:
                known |= origins
                stack += self._climbs.get(current, ())

    def _forget(self, item: Consumer) -> None:
        """Have the next graph looked through for what this consumer gives."""
        known = self._search.placements
        for key in [
            key for key in known.evidence if key[:2] == ("use", f"{item.path}{item.node.name()}:{item.input_index}")
        ]:
            known.forget(key)

    def _evidence(self, level: Sequence[Consumer]) -> list[tuple[Evidence, int]]:
        """For each node the evidence for the output that tells, and which output that is."""
        if self._one_sample:
            return [(Placement(0, Layout.BLOCKS), 0)] * len(level)
        places: list[tuple[Key, list[Wanted]]] = []
        counts: Counter[str] = Counter()
        for node, index, path in level:
            what = f"{path}{node.name()}:{index}"
            counts[what] += 1
            place: Key = ("use", what, counts[what])
            places.append((place, self._views(node, place)))
        self._search([item for _, views in places for item in views])
        return [self._telling(place, views) for place, views in places]

    def _views(self, node: Node, place: Key) -> list[Wanted]:
        """The output of a node that told about the samples before; all of its outputs if none has yet."""
        known, shapes = self._search.placements.telling_outputs.get(place), output_shapes([node])
        outputs = range(len(shapes)) if known is None else [known]
        return [((*place, nr), GradientEdge(node, nr), shapes[nr]) for nr in outputs]

    def _telling(self, place: Key, views: list[Wanted]) -> tuple[Evidence, int]:
        """The evidence for the first output with a placement, else the first that a gradient reaches, else the first."""
        found = [(self._search.placements.evidence[key], edge.output_nr) for key, edge, _ in views]
        told = [item for item in found if item[0] not in SILENT]
        best = next((item for item in told if isinstance(item[0], Placement)), (told or found)[0])
        if told:
            self._search.placements.telling_outputs[place] = best[1]
        return best

    def _use(self, forward: Forward, node: Node, indices: list[int], placement: Placement, output: int) -> ParameterUse:
        inputs = node.next_functions
        values = [UsedValue(index, self._value(*inputs[index], self._origins[node, index])) for index in indices]
        values = [one for one in values if one.value.targets]
        for one in values:
            one.value.takers += 1
        others = [child for index, (child, _) in enumerate(inputs) if index not in indices and child is not None]
        is_first = all(self._is_free(child) for child in others)
        return ParameterUse(forward, values, placement, output, is_first)

    def _is_free(self, node: Node) -> bool:
        """Whether a node's value was computed from parameters alone."""
        for current in _reached(node, self._targets):
            if current in self._targets:
                continue
            if current in self._walk.records or current in self._frontier or not current.next_functions:
                return False
        return True

    def _value(self, made_by: Node | None, nr: int, origins: set[Node]) -> BatchFreeValue:
        """A value, and all that it was computed from and that meets no sample by itself on the way to it.

        A value that belongs to several samples, such as a sum of something that each sample has and something that all share, was
        computed from more. A way through another node of the frontier, or through a call, is left to that node or call: if a
        layer is called twice, its first call counts the gradient that comes to its weight through that call.
        """
        assert made_by is not None
        key = made_by, nr, frozenset(origins)
        if (found := self._values.get(key)) is None:
            found = self._values[key] = BatchFreeValue(value_shape(made_by, nr), self._ways_to(made_by, nr, origins))
        return found

    def _ways_to(self, made_by: Node, nr: int, origins: set[Node]) -> list[tuple[Target, BatchFreeVjp]]:
        """The ways from a value to those of some targets that it was computed from; several nodes may take the value."""
        reached = list(_reached(made_by, self._ends))
        closed = frozenset([node for node in reached if node in self._closed or node in self._targets])
        found: list[tuple[Target, BatchFreeVjp]] = []
        for node in reached:
            if node in origins:
                target = self._targets[node]
                shape = self._table.rows[target].shape if isinstance(target, int) else tuple(target.shape)
                found.append((target, batch_free_vjp((made_by, nr), node, shape, closed)))
        return found


def _reached(start: Node, ends: Container[Node]) -> Iterator[Node]:
    """A node and all that it was computed from, each once, without what lies behind the ``ends``."""
    stack, seen = [start], {start}
    while stack:
        node = stack.pop()
        yield node
        if node not in ends:
            for child, _ in node.next_functions:
                if child is not None and child not in seen:
                    seen.add(child)
                    stack.append(child)
