"""The places of calls: where the output of each layer's call in a graph has its samples."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter, itemgetter
from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from torch_secorder.autograd.nodes import output_shapes
from torch_secorder.autograd.sharded import GatheredWeights
from torch_secorder.batch_axis.count import Seen
from torch_secorder.batch_axis.evidence import Unplaced
from torch_secorder.batch_axis.knowledge import ModelKnowledge, PlacementCache, Wanted
from torch_secorder.batch_axis.order import ONE_ORDER, Order
from torch_secorder.batch_axis.placement import FIRST, Layout, Placement
from torch_secorder.batch_axis.search import SampleSearch, SearchOnAllRanks
from torch_secorder.batch_axis.search_pass import SearchPasses
from torch_secorder.batch_axis.trust import Trust
from torch_secorder.capture.model_run import Forward
from torch_secorder.capture.own_axes import (
    OwnAxis,
    contradicted_axis,
    has_one_sample,
    require_first_axis,
    takes_for_one_sample,
    without_batch_axis,
)
from torch_secorder.capture.records import Idle, Record
from torch_secorder.graph.carried_axes import CarriedAxis
from torch_secorder.graph.graph import Graph
from torch_secorder.graph.orders import order_given_by, order_of
from torch_secorder.graph.refusals import hidden, not_counted, not_finite, on_another_axis, refuse
from torch_secorder.graph.walk import Walk
from torch_secorder.graph.wanted import nodes_ahead, wanted_of_own_axes
from torch_secorder.model.parameters import Table
from torch_secorder.model.ranks import Ranks

Reached = list[tuple[Record, GradientEdge]]


class Questions(NamedTuple):
    """What decides how a graph is searched. Ranks that hold the model together decide in common.

    Attributes:
        several_samples: whether there is more than one sample.
        reorders_samples: whether the samples may be in another order in each batch, so that nothing that was found in
            other batches holds for this one, nor the other way round.
        ambiguous_shapes: whether shapes leave open where the samples are.
        uses_outside_calls: whether some parameter is used outside of its module's call.
    """

    several_samples: bool
    reorders_samples: bool
    ambiguous_shapes: bool
    uses_outside_calls: bool

    @classmethod
    def of(cls, walk: Walk, n: int, order: Order, *, is_odd: bool = False) -> Questions:
        """The answers for one graph of n samples.

        Where rows are something else than samples, no shape shows anything, and no batch shows it for others.
        """
        reorders = order.may_change or is_odd
        ambiguous = reorders or walk.has_ambiguous_axis or not order.as_shapes_say
        for record, _ in walk.calls:
            ambiguous = ambiguous or record.placement is None
        return cls(n > 1, reorders, ambiguous, bool(walk.uses))

    def on_any(self, ranks: Ranks) -> Questions:
        """For each question whether any rank says yes."""
        return Questions(*map(bool, ranks.max_each_over_ranks(self)))


class CallPlaces:
    """Finds where the calls in one model's graphs have their samples.

    Args:
        table: the analyzed parameters.
        knowledge: what is known about the model already.
        locate_on_three_samples: adds to the knowledge from a batch of three samples; called when a search is needed.
        trust: what is believed of where samples are.
    """

    def __init__(
        self,
        table: Table,
        knowledge: ModelKnowledge,
        locate_on_three_samples: Callable[[], None] | None,
        trust: Trust,
    ):
        self._table, self._ranks, self._knowledge = table, table.ranks, knowledge
        self._locate_on_three_samples = locate_on_three_samples
        self._trust = trust

    def known_order(self, graph: Graph) -> Order | None:
        """What decides where the samples are in graphs of this kind; None if that is not known yet."""
        return ONE_ORDER if graph.forward.n == 1 else self._knowledge.orders.get(graph.walk.fingerprint)

    def search(self, graph: Graph, asked: Questions, order: Order) -> SampleSearch:
        """A search in this graph, which begins with what graphs of the same kind have shown."""
        forward, placed, walk = graph.forward, graph.placed, graph.walk
        n, known = forward.n or 0, self._known(graph, asked, order)
        others = () if forward.sharded else self._table.sharded
        weights = GatheredWeights(forward.sharded, others) if forward.sharded or others else None
        refusal = partial(not_counted, forward.count, list(map(attrgetter("shape"), map(itemgetter(0), placed))))
        passes = partial(SearchPasses, placed, n, weights=weights, not_counted=refusal)
        if self._ranks.distributed:
            # Nothing is looked at ahead. With one sample autograd skips nodes that broadcast, so that ranks with batches of
            # different sizes would look at different nodes.
            passes = partial(passes, common_count=self._ranks.max_over_ranks)
            return SearchOnAllRanks(known, n, asked.ambiguous_shapes, passes, self._ranks)
        ahead = partial(nodes_ahead, walk, walk.calls, self._knowledge.searched(walk.fingerprint))
        labels = None if self._trust.numbers else partial(graph.derivation, known.comparing, calls_functions=True)
        search = partial(SampleSearch, known, n, asked.ambiguous_shapes, passes, instead_of_numbers=labels)
        search = partial(search, rehearsal=self._trust.rehearsal)
        if not asked.reorders_samples:
            derivation = graph.derivation() if self._trust.shapes and self._believes_nodes(graph) else None
            return search(self._locate_on_three_samples, ahead, derivation=derivation, expected=graph.derivation)
        if not (order.is_derived and self._knowledge.derives) or n == 1:
            return search(None, ahead)
        if known.graphs_seen:
            return search(None, ahead, expected=graph.derivation)
        contradicted = self._derivation_was_wrong if self._knowledge.derivations.due(walk.ingredients) else None
        return search(None, ahead, derivation=graph.derivation(calls_functions=True), on_contradiction=contradicted)

    def _believes_nodes(self, graph: Graph) -> bool:
        """Whether what the nodes tell is believed without a pass, as shapes that allow one reading are.

        It is asked where samples are checked afterwards, which brings the passes if some sample differs. Where several outputs
        have samples, one may compare those of another, which only passes show.
        """
        is_alone = sum(where is not None for _, where in graph.placed) == 1
        return self._knowledge.derives and is_alone and graph.forward.n != 1

    def learn(self, graph: Graph, search: SampleSearch, known: Order | None) -> None:
        """Note what was asked about, and what decides where the samples are in graphs of this kind, when all are found.

        Args:
            graph: the graph.
            search: what was searched in it.
            known: what was known before of graphs of its kind.
        """
        fingerprint = graph.walk.fingerprint
        asked = {edge.node for key, edge, _ in search.looked if key[0] == "use"}
        if asked and not self._ranks.distributed:
            numbers = (number for number, node in enumerate(graph.walk.numbered) if node in asked)
            self._knowledge.searched(fingerprint).update(numbers)
        if known is not None and not known.is_derived:
            return  # Nothing that is learned of this graph would hold for the next one.
        comparing = search.placements.comparing
        as_shapes_say = graph.is_as_shapes_say(comparing) if known is None else known.as_shapes_say
        order = order_of(graph.walk, graph.derivation(comparing), as_shapes_say=as_shapes_say)
        if not self._knowledge.derives or (search.looked and search.exceeds(graph.derivation(comparing))):
            order = replace(order, is_derived=False)
        self._knowledge.learn(fingerprint, order)

    def _derivation_was_wrong(self) -> None:
        """Passes have shown another order than what nodes saved, which is believed no more."""
        self._knowledge.derives = False

    def _known(self, graph: Graph, asked: Questions, order: Order) -> PlacementCache:
        """What graphs of the same kind have shown: where samples may be in another order, those with that very order."""
        fingerprint = graph.walk.fingerprint
        if not asked.reorders_samples:
            known = self._knowledge.placements(fingerprint, by_numbers=self._trust.numbers)
            if graph.is_new:  # An earlier one may have been refused before it was known what decides the order.
                known.clear()
            return known
        given = None
        if not (graph.forward.count.is_odd or self._ranks.distributed):
            outputs, packs = [x for x, _ in graph.placed], graph.forward.has_packed_inputs
            given = order_given_by(order, graph.walk, outputs, packs=packs)
        in_order = partial(self._knowledge.placements_in_order, fingerprint, by_numbers=self._trust.numbers)
        return PlacementCache() if given is None else in_order(given)

    def place(
        self,
        forward: Forward,
        reached: Reached,
        own_axes: Sequence[OwnAxis | CarriedAxis],
        search: SampleSearch,
        asked: Questions,
        keeps_order: Callable[[], bool],
        behind_shared_rows: Container[Node] = (),
    ) -> list[Record]:
        """Give each record its placement; returns those of calls that all samples share, which have none.

        Args:
            forward: the run of the model.
            reached: the calls.
            own_axes: the axes on which samples must be, or must not be.
            search: finds where the samples are.
            asked: what decides how the graph is searched.
            keeps_order: whether this graph has its samples where shapes say. It is asked where calls are hidden.
            behind_shared_rows: the nodes of which shapes say nothing, if no output with samples leads to them.
        """
        n = forward.n or 0
        for record, _ in reached:
            record.in_output_graph = True
        contradicted = bool(own_axes) and any(one.contradicts_shapes(n) for one in own_axes)
        by_shape = self._trust.shapes and not (asked.ambiguous_shapes or contradicted)
        if by_shape or not asked.several_samples:
            for record, _ in reached:
                if record.placement is None or (n == 1 and has_one_sample(record)):  # All of it belongs to one sample.
                    record.placement = Placement(0, Layout.BLOCKS)
            return []
        wanted, beside = wanted_of_calls(reached), wanted_of_own_axes(own_axes) if own_axes else []
        search([*wanted, *beside])
        for one, (key, _, _) in zip(own_axes, beside, strict=True):
            found = search.placements.evidence[key]
            if isinstance(found, Placement) and one.contradicts(found):
                raise one.refusal(n)
        shared: list[Record] = []
        for (record, edge), (key, _, _) in zip(reached, wanted, strict=True):
            found = search.placements.evidence[key]
            if found is Unplaced.SHARED_BY_SAMPLES:
                shared.append(record)
            elif isinstance(found, Placement):
                record.placement = found
                if found.axis:
                    require_first_axis(record, found.axis, forward.count)
            elif found is Unplaced.NOT_FINITE and (asked.ambiguous_shapes or record.placement is None):
                record.forward.refusal = not_finite(f"the gradients of {self._names_of(record)}")
            elif found is Unplaced.HIDDEN:
                if record.placement is not None and keeps_order():
                    continue
                refuse(forward, hidden(str(record.site), n), self._ranks)
            elif asked.ambiguous_shapes or record.placement is None or edge.node in behind_shared_rows:
                record.placement, record.idle = None, Idle(found, partial(search.placements.forget, key))
        if shared:
            _require_no_batch_axis(forward, shared)
        # Where a forward is refused, some samples may be hidden, and those contradict nothing.
        if forward.refusal is None:
            for seen, argument in forward.inputs:
                if tuple(seen.shape).count(n) > 1:
                    _require_axis_of_input(
                        forward, seen, argument, zip(reached, wanted, strict=True), search.placements
                    )
        return shared

    def require_order_of_checkpoints(self, graph: Graph, search: SampleSearch, keeps_order: Callable[[], bool]) -> None:
        """Have a forward refused if the outputs of a re-entrant checkpoint do not have their samples in order.

        The checkpoint is supposed to leave them where they are, and its part of the model is looked through when it runs again.
        """
        wanted: list[Wanted] = [
            (("checkpoint", number, nr), GradientEdge(node, nr), shape)
            for number, node in enumerate(graph.walk.checkpoints)
            for nr, shape in enumerate(output_shapes([node]))
        ]
        search(wanted)
        for key, _, shape in wanted:
            found, n = search.placements.evidence[key], graph.forward.n or 0
            if isinstance(found, Placement):
                in_order = FIRST.agrees(found, shape, n)
            else:
                in_order = found is not Unplaced.SHARED_BY_SAMPLES and keeps_order()
            if not in_order:
                refuse(graph.forward, hidden(f"an output of shape {tuple(shape)}", n), self._ranks)

    def _names_of(self, record: Record) -> str:
        return ", ".join(map(self._table.names.__getitem__, record.site.positions))


def _require_no_batch_axis(forward: Forward, shared: Sequence[Record]) -> None:
    """Raise if a call that all samples share got the argument that counts them, whose samples it took for a single one."""
    argument = forward.counting()
    for record in shared:
        if argument is not None and takes_for_one_sample(record, argument):
            raise without_batch_axis(str(record.site), f"an input of shape {tuple(argument.shape)}", forward.n or 0)


def _require_axis_of_input(
    forward: Forward,
    seen: Seen,
    argument: Tensor,
    places: Iterable[tuple[tuple[Record, GradientEdge], Wanted]],
    known: PlacementCache,
) -> None:
    """Raise if a layer that got an argument of the model has its samples along another axis of that than is assumed."""
    assert isinstance(seen.axis, int)
    for (record, _), (key, _, _) in places:
        if (axis := contradicted_axis(record, argument, seen.axis, proven=known.is_proven(key))) is not None:
            raise on_another_axis(record, forward.count, seen, axis)


def wanted_of_calls(reached: Reached) -> list[Wanted]:
    """The places of the calls' outputs, each known by its module, its dimensions and how often the module was called before."""
    counts, wanted = dict[str, int](), list[Wanted]()
    for record, edge in reached:
        name, shape = record.site.name, record.shape
        count = counts.get(name, 0)
        wanted.append((("call", name, len(shape), count), edge, shape))
        counts[name] = count + 1
    return wanted
