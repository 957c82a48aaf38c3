"""What was found out about a model: kept as long as the model, for later graphs of the same kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.autograd.graph import GradientEdge

from torch_secorder.arguments import Reduction
from torch_secorder.batch_axis.evidence import Doubt, Evidence, Finding, Unplaced
from torch_secorder.batch_axis.order import Order
from torch_secorder.batch_axis.placement import FIRST, Placement
from torch_secorder.batch_axis.told import NOTHING, Told

Key = tuple[object, ...]
Wanted = tuple[Key, GradientEdge, Sequence[int]]  # what to remember it by, where in the graph, the shape to see it in

# How many kinds of graph are remembered. A model that makes more of them hardly makes the same one twice, so that there is
# little to gain from remembering, and the memory would grow without end.
KINDS_OF_GRAPH = 64


def is_due(count: int) -> bool:
    """Whether the ``count``-th of something is looked at: the 1st, 2nd, 3rd, 5th, 9th, 17th, ..., ever more rarely."""
    return (count - 1).bit_count() < 2


class KindSchedule:
    """When something is checked again: graphs of each kind are counted by themselves."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def due(self, fingerprint: int) -> bool:
        """Count a graph of this kind; returns whether this one is to be checked."""
        if len(self._counts) > KINDS_OF_GRAPH:
            self._counts.clear()
        self._counts[fingerprint] += 1
        return is_due(self._counts[fingerprint])

    def restart(self) -> None:
        """Count from the beginning."""
        self._counts.clear()


class Schedule:
    """When a function of the user's is checked again."""

    def __init__(self) -> None:
        self._of_functions: WeakKeyDictionary[Any, KindSchedule] = WeakKeyDictionary()

    def due(self, function: Callable[..., Any], fingerprint: int) -> bool:
        """Count an analysis of ``function`` with a graph of this kind; returns whether this one is to be checked."""
        try:
            return self._of_functions.setdefault(function, KindSchedule()).due(fingerprint)
        except TypeError:  # A function without a weak reference or a hash can't be counted.
            return True

    def restart(self) -> None:
        """Count from the beginning."""
        self._of_functions.clear()


@dataclass(eq=False)
class PlacementCache:
    """Where graphs of one kind have their samples.

    Attributes:
        evidence: what was found at each place that was looked at.
        telling_outputs: for nodes with several outputs, the one whose gradient shows the samples.
        untold: the places of whose samples the nodes of graphs of this kind tell too little.
        graphs_seen: how many graphs of this kind there were.
        comparing: the numbers of the model's outputs that compare samples.
        keeps_lists: whether the graphs have their samples at the same indices each time.
        keeps_order: whether the labels of the graphs have shown that the samples are where shapes say; None if nobody has asked.
        doubts: the numbers of outputs that may have their samples on another axis than the first, each with why.
        is_asked: whether outputs were asked for another axis by callers that check no samples afterwards.
        shows_first_axis: whether the graphs show by their sizes that the outputs have their samples on the first axis.
    """

    evidence: dict[Key, Evidence] = field(default_factory=dict)
    _unproven: set[Key] = field(default_factory=set)
    telling_outputs: dict[Key, int] = field(default_factory=dict)
    untold: set[Key] = field(default_factory=set)
    graphs_seen: int = 0
    comparing: set[int] = field(default_factory=set)
    keeps_lists: bool = False
    keeps_order: bool | None = None
    doubts: dict[int, Doubt] = field(default_factory=dict)
    is_asked: bool = False
    shows_first_axis: bool = False

    def keep(self, key: Key, found: Finding) -> None:
        """Note what a look showed; what it does not prove is good for one graph, unless it agrees with what is known."""
        known = self.evidence.get(key)
        if isinstance(known, Placement) and known.sample_index is None and key not in self._unproven:
            says_nothing = found.evidence in (Unplaced.NO_GRADIENT, Unplaced.NOT_FINITE)
            if says_nothing or (not found.proven and known in (found.evidence, *found.others)):
                return
        self.evidence[key] = found.evidence
        (self._unproven.discard if found.proven else self._unproven.add)(key)

    def is_proven(self, key: Key) -> bool:
        """Whether no other placement explains what was seen at a place."""
        return key not in self._unproven

    def clear(self) -> None:
        """Forget all that graphs of this kind have shown."""
        self.evidence.clear()
        self._unproven.clear()
        self.telling_outputs.clear()
        self.untold.clear()
        self.comparing.clear()
        self.doubts.clear()
        self.graphs_seen, self.keeps_order, self.is_asked = 0, None, False

    def forget(self, key: Key) -> None:
        """Have the next graph looked through for this place."""
        self.evidence.pop(key, None)

    def exceeds(self, key: Key, derived: Finding, shape: Sequence[int], n: int) -> bool:
        """Whether a look has shown more of a place than was derived, or something else. What it has not proven does not count."""
        if isinstance(self.evidence.get(key), Placement) and not isinstance(derived.evidence, Placement):
            return key not in self._unproven
        return key in self.evidence and self.contradicts(key, derived, shape, n)

    def contradicts(self, key: Key, derived: Finding, shape: Sequence[int], n: int) -> bool:
        """Whether a look has shown that a place is not where it was derived to be."""
        shown = self.evidence[key]
        if not isinstance(derived.evidence, Placement) or not isinstance(shown, Placement):
            return isinstance(derived.evidence, Placement) and shown is Unplaced.SHARED_BY_SAMPLES
        return self.is_proven(key) and not derived.evidence.agrees(shown, shape, n)

    def examines_next(self, *, always: bool = False) -> bool:
        """Count a graph; returns whether what is known is examined again in it.

        A gate may have opened since, or an order may have changed.
        """
        if always:
            return True
        self.graphs_seen += 1
        return is_due(self.graphs_seen)

    def _lasts(self, known: Placement) -> bool:
        """Whether a placement may be that of the next graph, too; a router decides anew for each batch."""
        return known.sample_index is None or self.keeps_lists

    def missing(self, wanted: Sequence[Wanted], n: int, ambiguous_shapes: bool) -> list[Wanted]:
        """The places in a graph of n samples for which no evidence is known that holds there.

        A call that no gradient reached, or that is hidden, could not be placed. Until what is known is examined again, it keeps
        the placement that its shape suggests, unless shapes are ambiguous. A use has none to keep, and is searched for anew. That
        no way leads to a place is the same in each graph of a kind; a gradient that comes there nevertheless is refused.
        """
        found: list[Wanted] = []
        for item in wanted:  # Every step does this, without a function for each place.
            key, _, shape = item
            known = self.evidence.get(key)
            if known is FIRST:
                holds = shape[:1] == (n,) and key not in self._unproven
            elif isinstance(known, Placement):
                holds = self._lasts(known) and known.fits(shape, n) and key not in self._unproven
            elif known in (Unplaced.NO_GRADIENT, Unplaced.NOT_FINITE, Unplaced.HIDDEN):
                holds = key[0] in ("own axis", "checkpoint") or (key[0] == "call" and not ambiguous_shapes)
            else:
                holds = known is Unplaced.SHARED_BY_SAMPLES or known is Unplaced.NOT_REACHED
            if not holds:
                found.append(item)
        return found


class ModelKnowledge:
    """What was found out about one model.

    Attributes:
        trusts_shapes: whether a shape that allows one reading only is believed; false once that was a mistake.
        schedule: when the analyses of a function are checked again.
        warned_of_slow_rules: whether the user was told that most of the work is done by slow rules.
        cancelled: the names of parameters whose squared norms have lost digits as sums with signs.
        derives: whether what nodes saved is believed where samples are in another order each time; false once it was wrong.
        derivations: when passes are to show whether it is right.
        orders: what decides where samples are, for each kind of graph of which that is known.
        shown_on_first_axis: the layouts of graphs whose outputs have their samples on the first axis, as sizes have shown.
        reruns_in_order: the kinds of graphs of re-entrant checkpoints, run again, of which labels have shown that they keep the
            samples in order.
    """

    def __init__(self) -> None:
        self.trusts_shapes = True
        self.schedule = Schedule()
        self.warned_of_slow_rules = False
        self.cancelled: set[str] = set()
        self.derives = True
        self.derivations = KindSchedule()
        self.orders: dict[int, Order] = {}
        self.reruns_in_order: set[int] = set()
        self.shown_on_first_axis: set[int] = set()
        self._searched: dict[int, set[int]] = {}
        self._by_fingerprint: dict[tuple[int, bool], PlacementCache] = {}
        self._in_order: dict[tuple[int, bool], tuple[Hashable, PlacementCache]] = {}
        self._reductions: WeakKeyDictionary[Any, Reduction] = WeakKeyDictionary()
        self._sum_checks: dict[Hashable, KindSchedule] = {}

    def sum_checks(self, kind: Hashable) -> KindSchedule:
        """When the sums of backward passes are compared, in all blocks of one kind: where they are and what they watch."""
        if len(self._sum_checks) > KINDS_OF_GRAPH:
            self._sum_checks.clear()
        return self._sum_checks.setdefault(kind, KindSchedule())

    def placements(self, fingerprint: int, *, by_numbers: bool = True) -> PlacementCache:
        """Those of one kind of graph: another branch of the model may have its samples on another axis.

        What the numbers of earlier batches have shown is known only to those who believe numbers.
        """
        if len(self._by_fingerprint) > KINDS_OF_GRAPH:
            self._by_fingerprint.clear()
        return self._by_fingerprint.setdefault((fingerprint, by_numbers), PlacementCache())

    def learn(self, fingerprint: int, order: Order) -> None:
        """Note what decides where graphs of one kind have their samples; if that may change, no graph holds for others."""
        if len(self.orders) > KINDS_OF_GRAPH:
            self.orders.clear()
        known = self.orders.get(fingerprint)
        self.orders[fingerprint] = order if known is None else known.joined(order)
        if self.orders[fingerprint].may_change:
            for by_numbers in (True, False):
                if (fingerprint, by_numbers) in self._by_fingerprint:
                    self._by_fingerprint[fingerprint, by_numbers].clear()

    def searched(self, fingerprint: int) -> set[int]:
        """The numbers of the nodes above parameters that were asked about in graphs of one kind, which are added by others."""
        if len(self._searched) > KINDS_OF_GRAPH:
            self._searched.clear()
        return self._searched.setdefault(fingerprint, set())

    def note_first_axis(self, layout: int) -> None:
        """Note that sizes have shown the samples on the first axis of the outputs of graphs of this layout."""
        if len(self.shown_on_first_axis) > KINDS_OF_GRAPH:
            self.shown_on_first_axis.clear()
        self.shown_on_first_axis.add(layout)

    def learn_rerun(self, fingerprint: int) -> None:
        """Note that the graphs of one kind that a re-entrant checkpoint makes keep the samples in order."""
        if len(self.reruns_in_order) > KINDS_OF_GRAPH:
            self.reruns_in_order.clear()
        self.reruns_in_order.add(fingerprint)

    def placements_in_order(self, fingerprint: int, order: Hashable, *, by_numbers: bool = True) -> PlacementCache:
        """Those of one kind of graph that has its samples in one order. Of each kind the latest order is remembered.

        Lists take memory, and where each batch has another order none of them comes again.
        """
        if len(self._in_order) > KINDS_OF_GRAPH:
            self._in_order.clear()
        known = self._in_order.get((fingerprint, by_numbers))
        if known is None or known[0] != order:
            known = self._in_order[fingerprint, by_numbers] = order, PlacementCache(keeps_lists=True)
        return known[1]

    def forget_shapes(self) -> None:
        """Forget where samples are, trust no shapes from now on, and check the next analysis of every function."""
        self.trusts_shapes = False
        self.orders.clear()
        self._by_fingerprint.clear()
        self._in_order.clear()
        self.schedule.restart()

    def reduction(self, function: Callable[..., Any], find: Callable[[Reduction | None], Reduction]) -> Reduction:
        """How a loss combines samples, "mean" or "sum": ``find`` of what it was the last time, or of None."""
        try:
            before = self._reductions.get(function)
        except TypeError:  # A function without a weak reference or a hash can't be remembered.
            return find(None)
        found = self._reductions[function] = find(before)
        return found


_knowledge: WeakKeyDictionary[nn.Module, dict[Hashable, ModelKnowledge]] = WeakKeyDictionary()


def knowledge_of(model: nn.Module, words: Told = NOTHING, *, checks: bool = True) -> ModelKnowledge:
    """What was found out about a model before: by callers that believe shapes and check samples, or by those that don't.

    The two are kept apart, since only the former find out that shapes have misled them.
    """
    kind = words.fingerprint, checks
    of_model = _knowledge.setdefault(model, {})
    return of_model.get(kind) or of_model.setdefault(kind, ModelKnowledge())
