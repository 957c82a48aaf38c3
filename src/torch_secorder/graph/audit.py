"""The audit: every use of every parameter is accounted for, or refused."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from functools import partial
from operator import itemgetter

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from torch_secorder.autograd.engine import innermost_transform, leaf_of
from torch_secorder.autograd.leaf_nodes import LeafNodes
from torch_secorder.autograd.nodes import keeps_state, tensors_of_weights, unseen_hooks
from torch_secorder.batch_axis.knowledge import ModelKnowledge
from torch_secorder.batch_axis.order import Order
from torch_secorder.batch_axis.placement import FIRST
from torch_secorder.batch_axis.search import SampleSearch
from torch_secorder.batch_axis.trust import BY_SEARCH, Trust
from torch_secorder.capture.model_run import Forward
from torch_secorder.capture.own_axes import OwnAxis
from torch_secorder.capture.records import Record
from torch_secorder.errors import CoverageError, CurvatureError, UnsupportedError
from torch_secorder.graph.call_places import CallPlaces, Questions
from torch_secorder.graph.carried_axes import ATTENDS, CarriedAxis
from torch_secorder.graph.frontier import Frontier
from torch_secorder.graph.graph import Graph
from torch_secorder.graph.one_reading import Reading, one_reading
from torch_secorder.graph.orders import order_of
from torch_secorder.graph.refusals import compares_samples, refuse
from torch_secorder.graph.samples_in_data import require_data
from torch_secorder.graph.uses import ParameterUse, Uses
from torch_secorder.graph.walk import Walk
from torch_secorder.model.parameters import Table


class Audit:
    """Accounts for every use of every parameter in the graph of one model's outputs.

    Args:
        table: the analyzed parameters.
        knowledge: what is known about the model already.
        locate_on_three_samples: adds to the knowledge from a batch of three samples; called when a search is needed.
        trust: what is believed of where samples are.

    Attributes:
        fingerprint: that of the latest graph.
        kind: what tells which graphs are alike where some are checked: where samples are in another order each time, a router
            also sends other numbers of rows each time, and fingerprints never come again.
        leaves: node that accumulates an analyzed parameter's gradient -> the parameter's position.
        refused: the outputs of the latest run that the loss must not use, each with the refusal if it does.
        other_leaves: the nodes of that graph that accumulate gradients of other tensors than the analyzed parameters.
        checkpoints: the nodes of re-entrant checkpoints in that graph, if it has several samples.
    """

    def __init__(
        self,
        table: Table,
        knowledge: ModelKnowledge | None = None,
        locate_on_three_samples: Callable[[], None] | None = None,
        trust: Trust = BY_SEARCH,
    ):
        self._table, self._ranks = table, table.ranks
        self.leaves = LeafNodes({position: p for position, p in enumerate(table.leaves) if p.requires_grad})
        self._knowledge, self._trust = knowledge or ModelKnowledge(), trust
        self._places = CallPlaces(table, self._knowledge, locate_on_three_samples, trust)
        self.fingerprint = self.kind = 0
        self.other_leaves: list[Node] = []
        self.refused: list[tuple[GradientEdge, CurvatureError]] = []
        self.checkpoints: list[Node] = []

    def renew_leaves(self) -> None:
        """Take the nodes that the parameters have now: a conversion (``model.double()``) gives them others."""
        if innermost_transform() is not None:  # Under vmap, no pass counts.
            return
        now = {position: leaf_of(node) for node, position in self.leaves.items()}
        still = {position: leaf for position, leaf in now.items() if leaf is not None and leaf.requires_grad}
        if len(still) == len(now) and (found := LeafNodes(still)).keys() != self.leaves.keys():
            self.leaves.take(found)

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
        roots, self.refused, self.checkpoints = list(map(itemgetter(0), placed)), [], []
        walk, n = Walk(roots, forward, self.leaves), forward.n
        self.fingerprint, self.other_leaves = walk.fingerprint, walk.other_leaves
        self.kind = walk.fingerprint
        if n is None:
            return Uses()
        graph = Graph(walk, placed, forward)
        known = self._places.known_order(graph)
        graph.is_new = known is None
        order = known or order_of(walk, graph.derivation(), as_shapes_say=graph.is_as_shapes_say())
        asked = Questions.of(walk, n, order, is_odd=forward.count.is_odd)
        if self._ranks.distributed:
            asked = asked.on_any(self._ranks)
        if asked.reorders_samples:
            self.kind = walk.kind
        search = self._places.search(graph, asked, order)
        own_axes: list[OwnAxis | CarriedAxis] = []
        if forward.own_axes:  # first, since they can be named
            own_axes += [one for one in forward.own_axes if one.edge.node in walk.nodes]
        # Whether a rank has as many samples as positions is its own affair, and all ranks look at the same places.
        if walk.carried_axes:
            own_axes += [one for one in walk.carried_axes if not (self._ranks.distributed and one.name in ATTENDS)]
        keeps_order = partial(_keeps_order, graph, search, order)
        behind = graph.behind_shared_rows if None in forward.placements else ()
        shared = self._places.place(forward, walk.calls, own_axes, search, asked, keeps_order, behind)
        if (asked.ambiguous_shapes or not search.placements.shows_first_axis) and not forward.words.says_all_outputs:
            self._require_one_reading(graph, search, asked, own_axes)
        if walk.checkpoints and asked.several_samples:
            self.checkpoints = walk.checkpoints
            if not self._ranks.distributed:  # All ranks look at the same places.
                self._places.require_order_of_checkpoints(graph, search, keeps_order)
        for number in search.placements.comparing:
            self.refused.append((get_gradient_edge(roots[number]), compares_samples()))
        any_shared = self._ranks.max_over_ranks(bool(shared)) if self._ranks.distributed else shared
        uses = Uses()
        if asked.uses_outside_calls or any_shared:
            uses = self._outside_calls(roots, walk, shared, search, forward, asked)
        if n > 1 and (known is None or search.looked):
            self._places.learn(graph, search, known)
        return uses._replace(search=search)

    def _require_one_reading(
        self, graph: Graph, search: SampleSearch, asked: Questions, own_axes: Sequence[OwnAxis | CarriedAxis]
    ) -> None:
        """Refuse outputs that may have the samples on another axis than the first, unless other batches have shown the first."""
        known, walk, n = search.placements, graph.walk, graph.forward.n
        if not known.shows_first_axis and all(w == FIRST and n not in x.shape[1:] for x, w in graph.placed):
            known.shows_first_axis = True
            self._knowledge.note_first_axis(walk.layout)
        # In most steps what is known of graphs of this kind is not examined again.
        asks = search.examines or not (known.is_asked or self._trust.first_axis)
        if asked.ambiguous_shapes and asked.several_samples and (known.doubts or asks):
            known.is_asked = known.is_asked or not self._trust.first_axis
            reading, believes = Reading(graph, search, own_axes, asks), partial(self._believes_first_axis, walk)
            refused = one_reading(reading, self._table, believes, checks_samples=self._trust.first_axis)
            self.refused = [(get_gradient_edge(graph.placed[number][0]), why) for number, why in refused.items()]

    def _believes_first_axis(self, walk: Walk) -> bool:
        """Whether the outputs have the samples on their first axis where nothing in this graph shows another."""
        return self._trust.first_axis or walk.layout in self._knowledge.shown_on_first_axis

    def _outside_calls(
        self,
        roots: Sequence[Tensor],
        walk: Walk,
        shared: list[Record],
        search: SampleSearch,
        forward: Forward,
        asked: Questions,
    ) -> Uses:
        """The uses of parameters outside of calls, and those in calls that all samples share."""
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
        if asked.several_samples:
            require_data(walk, [*shared, *inner], uses, forward, self._table.others)
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

    def _require_trainable(self, forward: Forward, records: Iterable[Record]) -> None:
        """Have a forward refused if calls that are taken for their nodes have what no node shows: frozen parameters, or gates."""
        leaves = self._table.leaves
        lost = {p for record in records for p in record.site.positions if not leaves or not leaves[p].requires_grad}
        if not lost:
            return
        names = ", ".join(self._table.names[position] for position in sorted(lost))
        if leaves:
            error = CoverageError(
                f"{names}: frozen, in a layer that has no batch axis and whose input was computed from other parameters, "
                "where the autograd graph shows nothing of them: let them require a gradient, or use fisher_report, which "
                "turns gradients on for the time"
            )
        else:
            error = CoverageError(
                f"{names}: called without a batch axis, on what other layers computed from parameters alone, where nothing has "
                "the gradient of each sample: leave it out of the modules that have gates"
            )
        refuse(forward, error, self._ranks)

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
                f"torch_secorder.register_rule, or run it without checkpointing{unseen_hooks()}"
            )
        for target in use.targets:
            use.forward.calls.update([target] if isinstance(target, int) else target.site.positions)

    def _names(self, use: ParameterUse) -> list[str]:
        return [self._table.names[target] if isinstance(target, int) else str(target.site) for target in use.targets]


def _keeps_order(graph: Graph, search: SampleSearch, order: Order) -> bool:
    """Whether a graph has its samples where shapes say; labels tell, once for all graphs that share what was found."""
    known = search.placements
    if known.keeps_order is None:
        known.keeps_order = graph.keeps_order(order)
    return known.keeps_order


def _first_with_samples(walk: Walk, batch_free: Container[Node]) -> list[Record]:
    """The calls whose output has samples, but that take what has none, as where one sample alone uses what a layer gave."""
    return [
        record
        for node, records in walk.records.items()
        if any(child in batch_free for child, _ in walk.children[node])
        for record in records
        if record.placement is not None and not record.starts_graph
    ]
