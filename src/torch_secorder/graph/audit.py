"""The audit: every use of every parameter is accounted for, or refused."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from functools import partial
from operator import attrgetter, itemgetter
from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from torch_secorder.autograd.nodes import accumulators, keeps_state, tensors_of_weights
from torch_secorder.autograd.sharded import GatheredWeights
from torch_secorder.batch_axis.derivation import Derivation
from torch_secorder.batch_axis.evidence import Unplaced
from torch_secorder.batch_axis.knowledge import ModelKnowledge, PlacementCache, Wanted
from torch_secorder.batch_axis.placement import Layout, Placement
from torch_secorder.batch_axis.search import SampleSearch, SearchOnAllRanks
from torch_secorder.batch_axis.search_pass import SearchPasses
from torch_secorder.capture.model_run import Forward
from torch_secorder.capture.own_axes import OwnAxis, contradicted_axis, takes_for_one_sample, without_batch_axis
from torch_secorder.capture.records import Idle, Record
from torch_secorder.errors import CoverageError, CurvatureError, UnsupportedError
from torch_secorder.graph.conditions import ATTENDS, CarriedAxis
from torch_secorder.graph.frontier import Frontier
from torch_secorder.graph.refusals import hidden, not_counted, not_finite, on_another_axis
from torch_secorder.graph.uses import ParameterUse, Uses
from torch_secorder.graph.walk import Walk
from torch_secorder.model.parameters import Table
from torch_secorder.model.ranks import Ranks

# How many nodes a chain from a parameter to the data is expected to have at most, so that one search pass sees all of it.
LOOK_AHEAD = 3

Reached = list[tuple[Record, GradientEdge]]


class Questions(NamedTuple):
    """What decides how a graph is searched. Ranks that hold the model together decide in common.

    Attributes:
        several_samples: whether there is more than one sample.
        reorders_samples: whether some node may put the samples into another order, so that nothing that was found in
            other batches holds for this one, nor the other way round.
        ambiguous_shapes: whether shapes leave open where the samples are.
        uses_outside_calls: whether some parameter is used outside of its module's call.
    """

    several_samples: bool
    reorders_samples: bool
    ambiguous_shapes: bool
    uses_outside_calls: bool

    @classmethod
    def of(cls, walk: Walk, reached: Reached, n: int, *, is_odd: bool = False) -> Questions:
        """The answers for one graph of n samples, whose outputs lead to the calls in ``reached``.

        Where rows are something else than samples, no shape shows anything, and no batch shows it for others.
        """
        reorders = walk.reorders_samples or is_odd
        ambiguous = reorders or walk.takes_samples_apart or walk.has_ambiguous_axis
        for record, _ in reached:
            ambiguous = ambiguous or record.placement is None
        return cls(n > 1, reorders, ambiguous, bool(walk.uses))

    def on_any(self, ranks: Ranks) -> Questions:
        """For each question whether any rank says yes."""
        return Questions(*map(bool, ranks.max_each_over_ranks(self)))


class Audit:
    """Accounts for every use of every parameter in the graph of one model's outputs.

    Args:
        table: the analyzed parameters.
        knowledge: what is known about the model already.
        locate_on_three_samples: adds to the knowledge from a batch of three samples; called when a search is needed.
        rehearsal: whether this is for a smaller batch, in which everything is looked at.
        trust_shapes: if only one axis has N indices, take it for the batch axis without a search. For callers that verify
            a sample afterwards.

    Attributes:
        fingerprint: that of the latest graph.
        kind: what tells which graphs are alike where some are checked: where samples are in another order each time, a router
            also sends other numbers of rows each time, and fingerprints never come again.
        leaves: node that accumulates an analyzed parameter's gradient -> the parameter's position.
        comparing: the outputs of the latest run that compare samples.
        other_leaves: the nodes of that graph that accumulate gradients of other tensors than the analyzed parameters.
    """

    def __init__(
        self,
        table: Table,
        knowledge: ModelKnowledge | None = None,
        locate_on_three_samples: Callable[[], None] | None = None,
        *,
        trust_shapes: bool = False,
        rehearsal: bool = False,
    ):
        self._table, self._ranks = table, table.ranks
        positions = [position for position, p in enumerate(table.leaves) if p.requires_grad]
        self.leaves = dict(
            zip(accumulators([table.leaves[position] for position in positions]), positions, strict=True)
        )
        self._knowledge, self._trust_shapes = knowledge or ModelKnowledge(), trust_shapes
        self._rehearsal = rehearsal
        self._locate_on_three_samples = locate_on_three_samples
        self.fingerprint = self.kind = 0
        self.other_leaves: list[Node] = []
        self.comparing: list[GradientEdge] = []

    def uses(self, forward: Forward, outputs: Sequence[Tensor]) -> Uses:
        """Place every record of a forward, and find every use that no record accounts for, each with its node.

        Raises:
            ShapeError: if a call's samples can't be found.
            CoverageError: if a parameter's use can't be taken apart by samples.
        """
        if not self._ranks.distributed:
            return self._uses(forward, outputs)
        with self._ranks.fail_together():
            return self._uses(forward, outputs)

    def _uses(self, forward: Forward, outputs: Sequence[Tensor]) -> Uses:
        placed = [(x, p) for x, p in zip(outputs, forward.placements, strict=True) if x.requires_grad]
        roots, self.comparing = list(map(itemgetter(0), placed)), []
        walk, n = Walk(roots, forward, self.leaves), forward.n
        self.fingerprint, self.other_leaves = walk.fingerprint, walk.other_leaves
        self.kind = walk.kind if walk.reorders_samples else walk.fingerprint
        if n is None:
            return Uses()
        # Every step does this, so that no function of Python's is called for each call.
        nodes, unfolded = walk.children, walk.unfolded
        reached = [
            (record, edge)
            for record, edge in forward.records
            if record.site.rule is not None and edge.node in nodes and record not in unfolded
        ]
        asked = Questions.of(walk, reached, n, is_odd=forward.count.is_odd)
        if self._ranks.distributed:
            asked = asked.on_any(self._ranks)
        search = self._search(walk, placed, forward, reached, asked)
        own_axes: list[OwnAxis | CarriedAxis] = []
        if forward.own_axes:  # first, since they can be named
            own_axes += [one for one in forward.own_axes if one.edge.node in nodes]
        # Whether a rank has as many samples as positions is its own affair, and all ranks look at the same places.
        own_axes += [one for one in walk.carried_axes if not (self._ranks.distributed and one.name in ATTENDS)]
        shared = self._place(forward, reached, own_axes, search, asked)
        if search.placements.comparing:
            self.comparing = [get_gradient_edge(roots[number]) for number in search.placements.comparing]
        any_shared = self._ranks.max_over_ranks(bool(shared)) if self._ranks.distributed else shared
        if not (asked.uses_outside_calls or any_shared):
            return Uses()
        for record in (*shared, *walk.unfolded):
            record.placement = None
        # Calls without a batch axis may take what other layers computed. Those layers have a gradient for every sample, too.
        inner = [record for record in shared if not record.starts_graph]
        self._require_trainable(forward, (*inner, *walk.unfolded))
        if inner:
            shared = [record for record in shared if record.starts_graph]
            walk = Walk(roots, forward, self.leaves, (*walk.unfolded, *inner))
        uses, beginning = self._at_frontier(walk, shared, search, forward, asked)
        while self._ranks.max_over_ranks(bool(beginning)) if self._ranks.distributed else beginning:
            # These calls count as the nodes that they consist of, since only the nodes show the gradients of what the calls take.
            for record in beginning:
                record.placement = None
            self._require_trainable(forward, beginning)
            walk = Walk(roots, forward, self.leaves, (*walk.unfolded, *beginning))
            uses, beginning = self._at_frontier(walk, shared, search, forward, asked)
        for use, node in uses.placed:
            self._require_readable(use, node)
        return uses

    def _at_frontier(
        self, walk: Walk, shared: list[Record], search: SampleSearch, forward: Forward, asked: Questions
    ) -> tuple[Uses, list[Record]]:
        """The uses at the frontier, and the calls that are at it themselves."""
        frontier = Frontier(walk, shared, search, self._table, one_sample=not asked.several_samples)
        uses = Uses(*frontier.uses(forward))
        return uses, _first_with_samples(walk, frontier.batch_free)

    def _search(
        self,
        walk: Walk,
        placed: list[tuple[Tensor, Placement | None]],
        forward: Forward,
        reached: Reached,
        asked: Questions,
    ) -> SampleSearch:
        """A search in this graph, which begins with what graphs of the same kind have shown."""
        n = forward.n or 0
        known = self._known(walk, forward, asked)
        weights = None
        if forward.sharded or self._table.sharded:
            weights = GatheredWeights(forward.sharded, () if forward.sharded else self._table.sharded)
        refusal = partial(not_counted, forward.count, list(map(attrgetter("shape"), map(itemgetter(0), placed))))
        passes = partial(SearchPasses, placed, n, weights=weights, not_counted=refusal)
        if self._ranks.distributed:
            # Nothing is looked at ahead. With one sample autograd skips nodes that broadcast, so that ranks with batches of
            # different sizes would look at different nodes.
            passes = partial(passes, common_count=self._ranks.max_over_ranks)
            return SearchOnAllRanks(known, n, asked.ambiguous_shapes, passes, self._ranks)
        ahead = partial(_ahead, walk, reached)
        search = partial(SampleSearch, known, n, asked.ambiguous_shapes, passes, rehearsal=self._rehearsal)
        if not asked.reorders_samples:
            return search(self._locate_on_three_samples, ahead)
        if not self._knowledge.derives or known.graphs_seen or n == 1:
            return search(None, ahead)
        # What is taken apart may lead to none of the leaves: the gates on a layer's output are in no graph.
        edges = (
            *map(itemgetter(1), reached),
            *map(attrgetter("edge"), forward.own_axes),
            *map(attrgetter("edge"), walk.carried_axes),
        )
        derivation = Derivation(placed, n, (*walk.leaves, *walk.other_leaves, *map(attrgetter("node"), edges)))
        contradicted = self._derivation_was_wrong if self._knowledge.derivations.due(walk.ingredients) else None
        return search(None, ahead, derivation=derivation, on_contradiction=contradicted)

    def _derivation_was_wrong(self) -> None:
        """Passes have shown another order than what nodes saved, which is believed no more."""
        self._knowledge.derives = False

    def _known(self, walk: Walk, forward: Forward, asked: Questions) -> PlacementCache:
        """What graphs of the same kind have shown: where samples may be in another order, those with that very order."""
        if not asked.reorders_samples:
            return self._knowledge.placements(self.fingerprint)
        if walk.order is None or forward.count.is_odd or self._ranks.distributed:
            return PlacementCache()
        return self._knowledge.placements_in_order(self.fingerprint, walk.order)

    def _place(
        self,
        forward: Forward,
        reached: Reached,
        own_axes: Sequence[OwnAxis | CarriedAxis],
        search: SampleSearch,
        asked: Questions,
    ) -> list[Record]:
        """Give each record its placement; returns those of calls that all samples share, which have none."""
        n = forward.n or 0
        for record, _ in reached:
            record.in_output_graph = True
        contradicted = bool(own_axes) and any(one.contradicts_shapes(n) for one in own_axes)
        by_shape = self._trust_shapes and not (asked.ambiguous_shapes or contradicted)
        if by_shape or not asked.several_samples:
            for record, _ in reached:
                if record.placement is None:  # There is one sample then, and all of the output belongs to it.
                    record.placement = Placement(0, Layout.BLOCKS)
            return []
        wanted, beside = _wanted(reached), _wanted_of_own_axes(own_axes) if own_axes else []
        search([*wanted, *beside])
        for one, (key, _, _) in zip(own_axes, beside, strict=True):
            found = search.placements.evidence[key]
            if isinstance(found, Placement) and one.contradicts(found):
                raise one.refusal(n)
        shared: list[Record] = []
        for (record, _), (key, _, _) in zip(reached, wanted, strict=True):
            found = search.placements.evidence[key]
            if found is Unplaced.SHARED_BY_SAMPLES:
                shared.append(record)
            elif isinstance(found, Placement):
                record.placement = found
            elif found is Unplaced.NOT_FINITE and (asked.ambiguous_shapes or record.placement is None):
                record.forward.refusal = not_finite(f"the gradients of {self._names_of(record)}")
            elif found is Unplaced.HIDDEN and (asked.ambiguous_shapes or record.placement is None):
                self._refuse(forward, hidden(str(record.site), n))
            elif asked.ambiguous_shapes or record.placement is None:
                record.placement, record.idle = None, Idle(found, partial(search.placements.forget, key))
        if shared and (argument := forward.counting()) is not None:
            for record in shared:
                if takes_for_one_sample(record, argument):
                    raise without_batch_axis(str(record.site), f"an input of shape {tuple(argument.shape)}", n)
        # Where a forward is refused, some samples may be hidden, and those contradict nothing.
        if forward.inputs and forward.refusal is None:
            self._require_axes_of_inputs(forward, reached)
        return shared

    def _require_axes_of_inputs(self, forward: Forward, reached: Reached) -> None:
        """Raise if a layer that got an argument of the model has its samples along another axis of that than is assumed."""
        for record, _ in reached:
            for seen, tensor in forward.inputs:
                assert isinstance(seen.axis, int)
                if (axis := contradicted_axis(record, tensor, seen.axis)) is not None:
                    raise on_another_axis(record, forward.count, seen, axis)

    def _require_trainable(self, forward: Forward, records: Iterable[Record]) -> None:
        """Have a forward refused if calls that are taken for their nodes have frozen parameters, which no node shows."""
        lost = {p for record in records for p in record.site.positions if not self._table.leaves[p].requires_grad}
        if lost:
            names = ", ".join(self._table.names[position] for position in sorted(lost))
            self._refuse(
                forward,
                CoverageError(
                    f"{names}: frozen, in a layer that has no batch axis and whose input was computed from other parameters, "
                    "where the autograd graph shows nothing of them: let them require a gradient, or use fisher_report, which "
                    "turns gradients on for the time"
                ),
            )

    def _refuse(self, forward: Forward, error: CurvatureError) -> None:
        """Have passes through a forward refused when they are over; ranks that hold the model together refuse it at once."""
        if self._ranks.distributed:
            raise error
        forward.refusal = forward.refusal or error

    def _names_of(self, record: Record) -> str:
        return ", ".join(self._table.names[position] for position in record.site.positions)

    def _require_readable(self, use: ParameterUse, node: Node) -> None:
        """Raise if what the rule of a use needs can't be read from its node; count the use otherwise."""
        if keeps_state(node):
            if fused := tensors_of_weights(node):
                raise UnsupportedError(
                    f"{', '.join(self._names(use))}: used by {node.name()}, a function that may add the gradient to an "
                    f"attribute of the weight ({', '.join(dict.fromkeys(fused))}) in its backward, so that none arrives in .grad "
                    "and it can't be called for single samples: turn the fusion of gradients with their accumulation off "
                    "(gradient_accumulation_fusion=False in Megatron), or teach the library the layer with "
                    "torch_secorder.register_rule"
                )
            raise UnsupportedError(
                f"{', '.join(self._names(use))}: used by {node.name()}, a function that keeps more than saved tensors and "
                "constants on ctx for its backward, or names a list, a mapping or a tensor from outside in it, which may change "
                "if it is called for single samples: save its tensors by ctx.save_for_backward, keep its numbers as attributes "
                "of ctx, or teach the library the layer with torch_secorder.register_rule"
            )
        if why := use.unreadable_because(node):
            raise UnsupportedError(
                f"{', '.join(self._names(use))}: used by {why} inside of activation checkpointing (or other hooks on saved "
                "tensors), where the autograd graph can't be read: teach the library the layer with "
                "torch_secorder.register_rule, or run it without checkpointing"
            )
        for target in use.targets:
            use.forward.calls.update([target] if isinstance(target, int) else target.site.positions)

    def _names(self, use: ParameterUse) -> list[str]:
        return [self._table.names[target] if isinstance(target, int) else str(target.site) for target in use.targets]


def _first_with_samples(walk: Walk, batch_free: Container[Node]) -> list[Record]:
    """The calls whose output has samples, but that take what has none, as where one sample alone uses what a layer gave."""
    return [
        record
        for node, records in walk.records.items()
        if any(child in batch_free for child, _ in walk.children[node])
        for record in records
        if record.placement is not None and not record.starts_graph
    ]


def _ahead(walk: Walk, reached: Reached) -> list[Node]:
    """The nodes that a search may be asked for after the calls: a few steps above each parameter, and each unplaced call."""
    consumers = (node for edges in walk.uses.values() for node, _ in edges)
    unplaced = (edge.node for record, edge in reached if record.placement is None)
    return walk.above(itertools.chain(consumers, unplaced), LOOK_AHEAD)


def _wanted_of_own_axes(own_axes: Sequence[OwnAxis | CarriedAxis]) -> list[Wanted]:
    """The places of outputs that have a batch axis of their own, or an axis that is none."""
    counts: Counter[str] = Counter()
    wanted: list[Wanted] = []
    for one in own_axes:
        wanted.append((("own axis", one.name, counts[one.name]), one.edge, one.shape))
        counts[one.name] += 1
    return wanted


def _wanted(reached: Reached) -> list[Wanted]:
    """The places of the calls' outputs, each known by its module, its dimensions and how often the module was called before."""
    counts: Counter[str] = Counter()
    wanted: list[Wanted] = []
    for record, edge in reached:
        name = record.site.name
        wanted.append((("call", name, len(record.shape), counts[name]), edge, record.shape))
        counts[name] += 1
    return wanted
