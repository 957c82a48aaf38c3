"""The search pass: gradients that flow through the user's graph, with the samples marked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from torch_secorder.autograd.engine import without_modes
from torch_secorder.autograd.graph_pass import GraphPass
from torch_secorder.autograd.opaque import Gradients
from torch_secorder.autograd.precision import has_half_precision
from torch_secorder.autograd.sharded import GatheredWeights
from torch_secorder.batch_axis.confirmation import PassPeaks, RowPeaks
from torch_secorder.batch_axis.evidence import SILENT, Evidence, Finding, Open, Unplaced, evidence
from torch_secorder.batch_axis.marks import MARKS_PER_PASS, MARKS_PER_PASS_OF_HALF, sample_marks
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.batch_axis.samples import rows_of
from torch_secorder.batch_axis.silence import loud_samples
from torch_secorder.batch_axis.sketch import Sketch, Sketches, read_together
from torch_secorder.errors import ShapeError
from torch_secorder.model.nested import sample_rows, whole, with_values

# Length of the repeated block of random numbers. It is prime, so that it can't line up with the period of an output's own layout.
SEED_PERIOD = 262_139
Viewed = tuple[GradientEdge, Sequence[int]]  # a place in the graph, and the shape in which its gradient is looked at


class SearchPasses:
    """Passes through the graph from a model's outputs, one for each set of marks.

    Args:
        placed: the model's outputs, and where each has its samples; one that has none shows nothing.
        n: how many samples.
        not_counted: the refusal if no output has the samples.
        common_count: from the number of passes that this graph needs to the number that is made. Ranks that search together
            agree on it here, when nothing is left to refuse: whoever has refused before doesn't come to the passes.
        weights: gathers the weights that are in parts on several ranks.
        comparing: the numbers of outputs that compare samples, which show nothing.
    """

    def __init__(
        self,
        placed: Sequence[tuple[Tensor, Placement | None]],
        n: int,
        common_count: Callable[[int], int] | None = None,
        weights: GatheredWeights | None = None,
        *,
        comparing: Container[int] = (),
        not_counted: Callable[[], ShapeError] = ShapeError,
    ):
        counted = {number: (x, where) for number, (x, where) in enumerate(placed) if where is not None}
        self._numbers = [number for number in counted if number not in comparing]
        self._placed = [counted[number] for number in self._numbers]
        self._roots = [root for root, _ in self._placed]
        self._n, self._weights, self._not_counted = n, weights, not_counted
        # Where ranks search together, no look of one of them is followed by another that the others don't take.
        self._together, self._common_count = common_count is not None, common_count or (lambda own: own)

    @cached_property
    def _marks_per_pass(self) -> int:
        return MARKS_PER_PASS_OF_HALF if has_half_precision(*self._roots) else MARKS_PER_PASS

    def findings(self, wanted: Sequence[Viewed]) -> list[Finding]:
        """What the gradients at these edges, each seen in its shape, say of their samples.

        Raises:
            ShapeError: if no output has the samples.
        """
        if not self._roots:
            raise self._not_counted()
        with without_modes():
            return self._findings(wanted)

    def agreeing(self, wanted: Sequence[Viewed], derived: Sequence[Finding], loud: Tensor) -> list[bool]:
        """For each edge whether one pass from the outputs of some samples agrees with where samples were derived to be.

        Raises:
            ShapeError: if no output has the samples.
        """
        if not self._roots:
            raise self._not_counted()
        places: dict[Node, list[int]] = defaultdict(list)
        for place, (edge, _) in enumerate(wanted):
            places[edge.node].append(place)
        passes = GraphPass(self._roots, places, weights=self._weights)
        told = [one.evidence for one in derived]
        peaks = PassPeaks([shape for _, shape in wanted], told, self._n)

        def arrive(node: Node, grads: Gradients) -> None:
            for place in places[node]:
                edge, shape = wanted[place]
                if (grad := grads[edge.output_nr]) is not None:
                    peaks.note(place, _seen(grad, shape))

        with without_modes():
            passes.run(partial(self._marked_roots, self._random_blocks(), loud), arrive)
            found = peaks.on_the_host()
        return [
            edge.node not in passes.hidden and _agree(rows, one, shape, self._n, loud)
            for (edge, shape), one, rows in zip(wanted, told, found, strict=True)
        ]

    def _findings(self, wanted: Sequence[Viewed]) -> list[Finding]:
        # Silence shows more than marks do; with two samples it takes no more passes.
        by_silence = len(loud_samples(self._n)) <= len(sample_marks(self._n, self._marks_per_pass))
        found = self._looked_at(wanted, by_silence=by_silence, in_brief=not self._together)
        for left_open, silently in ((Open.AXES, by_silence), (Open.ROUNDING, True)):
            left = [place for place, finding in enumerate(found) if finding is left_open]
            if not self._common_count(len(left)):
                continue
            places = range(len(wanted)) if self._together else left
            again = self._looked_at([wanted[place] for place in places], by_silence=silently, in_brief=False)
            for place, finding in zip(places, again, strict=True):
                if found[place] is left_open:
                    found[place] = finding
        return [finding for finding in found if isinstance(finding, Finding)]

    def _looked_at(self, wanted: Sequence[Viewed], *, by_silence: bool, in_brief: bool) -> list[Finding | Open]:
        """What the gradients show, and what a look leaves open.

        Args:
            wanted: where it is looked.
            by_silence: let some samples be silent in each pass, instead of marking all of them.
            in_brief: as for :meth:`Sketch.of`.
        """
        marks = loud_samples(self._n) if by_silence else sample_marks(self._n, self._marks_per_pass)
        own = len(marks)
        more = marks[:1] * (self._common_count(own) - own)
        passes, sketches = self._sketches(wanted, marks + more, in_brief)
        columns = zip(wanted, zip(*sketches[:own], strict=True), strict=True)
        return [
            Finding(Unplaced.HIDDEN)
            if edge.node in passes.hidden
            else Finding(Unplaced.NOT_REACHED)
            if edge.node not in passes.ends
            else evidence(column, self._n, self._marks_per_pass, by_silence=by_silence)
            for (edge, _), column in columns
        ]

    def comparing(self, wanted: Sequence[Viewed], found: Sequence[Finding]) -> set[int]:
        """The numbers of outputs that compare samples: for such an output alone something belongs to several that another places.

        Args:
            wanted: where it was looked.
            found: what all outputs together have shown there.
        """
        unclear = [
            view
            for view, finding in zip(wanted, found, strict=True)
            if finding.evidence is Unplaced.SHARED_BY_SAMPLES and view[1] and view[1][0] % self._n == 0
        ]
        if not unclear or len(self._roots) < 2:
            return set()
        each = [SearchPasses([one], self._n, weights=self._weights) for one in self._placed]
        alone = [one.findings(unclear) for one in each]
        placed = [any(isinstance(one.evidence, Placement) for one in several) for several in zip(*alone, strict=True)]
        return {
            number
            for number, findings in zip(self._numbers, alone, strict=True)
            if any(
                one.evidence is Unplaced.SHARED_BY_SAMPLES and other
                for one, other in zip(findings, placed, strict=True)
            )
        }

    def _sketches(
        self, wanted: Sequence[Viewed], marks: list[Tensor], in_brief: bool
    ) -> tuple[GraphPass, list[Sketches]]:
        """The passes, and for each set of marks a sketch of each wanted gradient, None where none arrives.

        Args:
            wanted: where it is looked.
            marks: one set for each pass.
            in_brief: as for :meth:`Sketch.of`.
        """
        places: dict[Node, list[int]] = defaultdict(list)
        for place, (edge, _) in enumerate(wanted):
            places[edge.node].append(place)
        passes, blocks = GraphPass(self._roots, places, weights=self._weights), self._random_blocks()
        found: list[Sketches] = []

        def arrive(node: Node, grads: Gradients) -> None:
            for place in places[node]:
                edge, shape = wanted[place]
                grad, first = grads[edge.output_nr], found[0][place] if len(found) > 1 else None
                if grad is not None:
                    found[-1][place] = Sketch.of(_seen(grad, shape), self._n, in_brief=in_brief, first=first)

        for mark in marks:
            found.append([None] * len(wanted))
            passes.run(partial(self._marked_roots, blocks, mark), arrive)
        return passes, read_together(found)

    def _marked_roots(self, blocks: list[Tensor], mark: Tensor) -> list[Tensor]:
        return [self._marked(*one, block, mark) for one, block in zip(self._placed, blocks, strict=True)]

    def _random_blocks(self) -> list[Tensor]:
        """For each root the random numbers that its gradient repeats, the same in each pass."""
        generator = torch.Generator().manual_seed(0)
        sizes = [min(x.numel(), SEED_PERIOD) for x in self._roots]
        return [
            torch.randn(size, generator=generator, dtype=torch.float32, device="cpu").to(x.device, x.dtype)
            for x, size in zip(self._roots, sizes, strict=True)
        ]

    @staticmethod
    def _marked(root: Tensor, placement: Placement, block: Tensor, mark: Tensor) -> Tensor:
        """A gradient for a root: the same random numbers in each pass, with each sample's part times its mark."""
        # A new one for each pass, since a node may change it in place. Those of all passes at once would be too much memory: an
        # output is sometimes as large as everything else.
        if not root.numel():
            return torch.zeros_like(root)
        gradient = block.repeat(-(-root.numel() // len(block)))[: root.numel()]
        if root.is_nested:
            values, of_rows = root.values(), mark.to(gradient)[sample_rows(root)]
            return with_values(root, gradient.view(values.shape) * of_rows.view(-1, *[1] * (values.dim() - 1)))
        return gradient.view(root.shape).mul_(rows_of(mark.to(gradient), root, placement))


def _agree(peaks: RowPeaks | None, derived: Evidence, shape: Sequence[int], n: int, loud: Tensor) -> bool:
    return derived in SILENT if peaks is None else peaks.agree(derived, shape, n, loud)


def _seen(grad: Tensor, shape: Sequence[int]) -> Tensor:
    """A gradient in one piece, in this shape; that of a sparse tensor, such as a matrix of learned edges, with its zeros."""
    if grad.is_nested:
        return whole(grad)
    return (whole(grad) if grad.layout is torch.strided else grad.to_dense()).reshape(tuple(shape))
