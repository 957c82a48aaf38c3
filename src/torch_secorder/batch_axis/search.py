"""The search for samples: what is known of a graph, what its nodes saved, what a small batch shows, and what only passes show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch.autograd.graph import GradientEdge, Node

from torch_secorder.autograd.nodes import output_shapes
from torch_secorder.batch_axis.derivation import Derivation
from torch_secorder.batch_axis.evidence import Finding, Unplaced
from torch_secorder.batch_axis.knowledge import Key, PlacementCache, Wanted
from torch_secorder.batch_axis.search_pass import SearchPasses, Viewed
from torch_secorder.batch_axis.silence import loud_samples
from torch_secorder.batch_axis.trust import by_labels_first
from torch_secorder.model.ranks import Ranks


class SampleSearch:
    """Finds where tensors in one graph have their samples, in the cheapest way that is left.

    Args:
        placements: what graphs of this kind have shown. What is found is added to it.
        n: how many samples this graph has.
        ambiguous_shapes: whether its shapes leave open where the samples are.
        passes: makes the backward passes through this graph, which are the last resort.
        locate_on_three_samples: adds to what is known from a smaller batch of the same model, if there is a way.
        look_ahead: the nodes that may be asked for later. If a pass is made, it looks at them too.
        rehearsal: whether this is the graph of a smaller batch, for which everything is looked at.
        derivation: tells from what the graph's nodes saved; None where that is not asked.
        on_contradiction: where passes are to show whether that is right, what is called if it is not.
        expected: makes one that tells the same of a graph which keeps its samples in order, for a pass to agree with. What its
            labels exclude is not taken for found.
        instead_of_numbers: if traces are differentiated, makes one that tells where the numbers of this batch prove nothing.

    Attributes:
        placements: as above.
        looked: the places at which passes have looked.
    """

    _together = False  # whether several ranks search, which all have to make the same passes

    def __init__(
        self,
        placements: PlacementCache,
        n: int,
        ambiguous_shapes: bool,
        passes: Callable[..., SearchPasses],
        locate_on_three_samples: Callable[[], None] | None = None,
        look_ahead: Callable[[], Iterable[Node]] = list,
        *,
        rehearsal: bool = False,
        derivation: Derivation | None = None,
        on_contradiction: Callable[[], None] | None = None,
        expected: Callable[[], Derivation] | None = None,
        instead_of_numbers: Callable[[], Derivation] | None = None,
    ):
        self._instead_of_numbers = instead_of_numbers
        self._derivation, self._on_contradiction, self._expected = derivation, on_contradiction, expected
        self._excluding = expected
        self.placements, self._n, self._passes = placements, n, passes
        self._locate_on_three_samples, self._look_ahead = locate_on_three_samples, look_ahead
        self._ambiguous_shapes = ambiguous_shapes
        self.looked: list[Wanted] = []
        self._ahead: dict[tuple[Node, int], Finding] = {}
        self._rehearsal = rehearsal
        self._examines: bool | None = None  # whether what is known is examined again, which the first question decides

    def __call__(self, wanted: Sequence[Wanted]) -> None:
        """Search where it is needed. Afterwards, ``placements.evidence`` has an entry for each of these places."""
        missing = self._missing(wanted)
        if missing and self._derivation is not None:
            missing = self._underived(missing, self._derivation)
        elif missing and not self._examines:
            missing = self._without_silent(missing)
        if missing and self._locate_on_three_samples is not None:
            self._locate_on_three_samples()
            missing = self.placements.missing(missing, self._n, self._ambiguous_shapes)
        if missing:
            self._find(missing)

    @property
    def examines(self) -> bool:
        """Whether what is known is examined again in this graph."""
        return bool(self._examines)

    def exceeds(self, derivation: Derivation) -> bool:
        """Whether passes have shown something that does not follow from what the graph's nodes saved."""
        found = derivation.suppositions([(edge, shape) for _, edge, shape in self.looked])
        return found is None or any(
            self.placements.exceeds(key, finding, shape, self._n)
            for (key, _, shape), finding in zip(self.looked, found, strict=True)
        )

    def _missing(self, wanted: Sequence[Wanted]) -> Sequence[Wanted]:
        """All of these places in a graph in which what is known is examined again, else those of which nothing is known."""
        if self._examines is None:
            self._examines = self.placements.examines_next(always=self._rehearsal)
        return wanted if self._examines else self.placements.missing(wanted, self._n, self._ambiguous_shapes)

    def _without_silent(self, wanted: Sequence[Wanted]) -> Sequence[Wanted]:
        """These places without those of which too little gradient has come so far, if the graph's nodes tell of their samples.

        A gate that is closed may open in any step, and one that stays closed would be searched behind in each. So would rows that
        an expert was sent and that get no gradient.
        """
        known = self.placements
        silent = [
            one
            for one in wanted
            if (known.evidence.get(one[0]) is Unplaced.NO_GRADIENT or not known.is_proven(one[0]))
            and one[0] not in known.untold
        ]
        if not silent or self._expected is None:
            return wanted
        derivation = self._expected()
        derived = derivation.findings([(edge, shape) for _, edge, shape in silent])
        told: set[Key] = set()
        for (key, _, shape), finding in zip(silent, derived or [], strict=derived is not None):
            if _tells(key, shape, finding, self._n, derivation.has_several_outputs):
                known.keep(key, finding)
                told.add(key)
        known.untold.update(key for key, _, _ in silent if key not in told)
        return [one for one in wanted if one[0] not in told]

    def _underived(self, wanted: Sequence[Wanted], derivation: Derivation) -> Sequence[Wanted]:
        """The places for which passes are needed: none where the graph's nodes tell of all, and are believed."""
        found = derivation.findings([(edge, shape) for _, edge, shape in wanted])
        if found is None or not all(
            _tells(key, shape, finding, self._n, derivation.has_several_outputs)
            for (key, _, shape), finding in zip(wanted, found, strict=True)
        ):
            self._derivation = None
            return wanted
        if self._on_contradiction is None:
            for (key, _, _), finding in zip(wanted, found, strict=True):
                self.placements.keep(key, finding)
            return []
        self._find(wanted)
        for (key, _, shape), finding in zip(wanted, found, strict=True):
            if self.placements.contradicts(key, finding, shape, self._n):
                self._on_contradiction()
                self._derivation = None
                break
        return []

    def _find(self, wanted: Sequence[Wanted]) -> None:
        """Take the evidence from what an earlier pass saw ahead, and from new passes."""
        evidence, left = self.placements.evidence, list[Wanted]()
        silent = set() if self._examines else {key for key, *_ in wanted if evidence.get(key) is Unplaced.NO_GRADIENT}
        for key, edge, shape in wanted:
            if key[0] == "use" and (found := self._ahead.get((edge.node, edge.output_nr))) is not None:
                self.placements.keep(key, found)
            else:
                left.append((key, edge, shape))
        if left:
            self._look(left)
        # A place that is as silent as before has shown nothing.
        self.looked += [one for one in wanted if one[0] not in silent or evidence[one[0]] is not Unplaced.NO_GRADIENT]

    def _look(self, wanted: list[Wanted]) -> None:
        nodes, self._look_ahead = list(self._look_ahead()), list
        ahead = [(node, nr, shape) for node in nodes for nr, shape in enumerate(output_shapes([node]))]
        viewed: list[Viewed] = [(edge, shape) for _, edge, shape in wanted]
        viewed += [(GradientEdge(node, nr), shape) for node, nr, shape in ahead]
        passes = self._passes(comparing=self.placements.comparing)
        keys, places = [key for key, _, _ in wanted], [(node, nr) for node, nr, _ in ahead]
        agreed = self._still_silent(passes, viewed, keys)
        if agreed is None:
            agreed = self._agreed(passes, viewed, len(wanted))
        if agreed is not None:
            self._note(keys, places, agreed)
            return
        found = passes.findings(viewed)
        if not self._together and (comparing := passes.comparing(viewed, found)):
            self.placements.comparing |= comparing
            found = self._passes(comparing=self.placements.comparing).findings(viewed)
        if self._excluding is not None:
            found = self._excluding().without_contradicted(viewed, found)
        derive = self._instead_of_numbers
        self._note(keys, places, found if derive is None else by_labels_first(keys, viewed, found, self._n, derive))

    def _still_silent(
        self, passes: SearchPasses, viewed: Sequence[Viewed], keys: Sequence[Key]
    ) -> list[Finding | None] | None:
        """That no gradient comes, for all places where none came before, and for those ahead where none comes either.

        One pass from the outputs of all samples shows it. The result is None if something comes to one of the first places, which
        have these keys, or if it is their turn to be examined.
        """
        evidence = self.placements.evidence
        if self._together or self._examines or any(evidence.get(key) is not Unplaced.NO_GRADIENT for key in keys):
            return None
        nothing = Finding(Unplaced.NO_GRADIENT)
        silent = passes.agreeing(viewed, [nothing] * len(viewed), torch.ones(self._n, device="cpu"))
        return [nothing if one else None for one in silent] if all(silent[: len(keys)]) else None

    def _agreed(self, passes: SearchPasses, viewed: Sequence[Viewed], count: int) -> list[Finding | None] | None:
        """What was derived of these places, None for those ahead of which a pass shows something else.

        The result is None if it does so of one of the first ``count`` places, which are those that are asked about.
        """
        expected, self._expected = self._expected, None
        derivation = None if expected is None or self._n < 2 else expected()
        if derivation is None or derivation.has_several_outputs or (derived := derivation.findings(viewed)) is None:
            return None
        sets = loud_samples(self._n)
        agreeing = passes.agreeing(viewed, derived, sets[self.placements.graphs_seen % len(sets)])
        if not all(agreeing[:count]):
            return None
        self._expected = expected
        return [one if agrees else None for one, agrees in zip(derived, agreeing, strict=True)]

    def _note(self, keys: Sequence[Key], ahead: Sequence[tuple[Node, int]], found: Sequence[Finding | None]) -> None:
        """Keep what was found of the places that are asked about, and of those that may be asked about later."""
        for key, finding in zip(keys, found[: len(keys)], strict=True):
            assert finding is not None
            self.placements.keep(key, finding)
        self._ahead.update(
            (place, one) for place, one in zip(ahead, found[len(keys) :], strict=True) if one is not None
        )


def _tells(key: Key, shape: Sequence[int], found: Finding, n: int, has_several_outputs: bool) -> bool:
    """Whether what was derived of a place is all that there is to know.

    More may be taken for shared by samples than is. What is asked about besides parameters' uses hardly ever is, and where
    there are several outputs one may compare what another has of each sample.
    """
    if found.evidence is not Unplaced.SHARED_BY_SAMPLES:
        return True
    return key[0] == "use" and not (has_several_outputs and shape and shape[0] % n == 0)


class SearchOnAllRanks(SampleSearch):
    """The same for a model that several ranks hold together.

    Either all of them search, at the same places, or none does. A pass has collective operations in it: a rank that made
    one alone would wait for the others forever.
    """

    _together = True

    def __init__(
        self,
        placements: PlacementCache,
        n: int,
        ambiguous_shapes: bool,
        passes: Callable[..., SearchPasses],
        ranks: Ranks,
    ):
        super().__init__(placements, n, ambiguous_shapes, passes)
        self._ranks = ranks

    def __call__(self, wanted: Sequence[Wanted]) -> None:
        """Search at all of these places if one of them is missing on any rank."""
        missing = self._missing(wanted)
        if not self._ranks.max_over_ranks(bool(missing)):
            return
        keys = [key for key, _, _ in wanted]
        self._ranks.require_same(
            keys,
            "their graphs leave different places open where the samples are; give all of them batches of one shape, or pass "
            "batch_axis=",
        )
        self._find(wanted)
        evidence = self.placements.evidence
        shared = self._ranks.max_each_over_ranks([evidence[key] is Unplaced.SHARED_BY_SAMPLES for key in keys])
        if self._n == 1:  # one sample looks like all of them, so that only another rank's evidence tells
            evidence.update((key, Unplaced.SHARED_BY_SAMPLES) for key, found in zip(keys, shared, strict=True) if found)
