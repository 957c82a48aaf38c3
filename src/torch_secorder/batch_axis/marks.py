"""The evidence of marks: entries that belong to a sample come back multiplied by the sample's mark.

A backward pass starts with random numbers at the model's outputs, another one with the same numbers times a mark for each
sample. If an entry of the second gradient is that of the first times sample n's mark, it belongs to sample n. Marks are powers
of two, which multiply without rounding, so that the two agree to the last digit, unless the device adds in another order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from torch_secorder.batch_axis.placement import Layout, Placement
from torch_secorder.batch_axis.sketch import Sketch

# How many marks one backward pass tells apart: 2^0 to 2^(B-1). With B = 8 in half precision and 32 in other dtypes, marked
# gradients stay inside the range of the dtype's exponents.
MARKS_PER_PASS_OF_HALF, MARKS_PER_PASS = 8, 32


def sample_marks(n: int, marks_per_pass: int = MARKS_PER_PASS) -> list[Tensor]:
    """The marks of all samples in each pass, ``[n]``: ones in the first pass, then powers of two.

    The exponents are the digits of the sample's number to the base ``marks_per_pass``, one digit in each pass, so that two
    samples differ in at least one of them.
    """
    return list(_sample_marks(n, marks_per_pass))


@lru_cache(16)  # a search asks for them at each place
def _sample_marks(n: int, marks_per_pass: int) -> tuple[Tensor, ...]:
    samples = torch.arange(n, dtype=torch.float64, device="cpu")
    digits = max(1, math.ceil(math.log(max(n, 2), marks_per_pass) - 1e-9))
    marks = (2.0 ** (samples // marks_per_pass**place % marks_per_pass) for place in range(digits))
    return torch.ones(n, dtype=torch.float32, device="cpu"), *(mark.float() for mark in marks)


# By how much a row may differ from its sample's mark times the plain row: relative to the row, and to the largest row. Powers of
# two do not change any rounding, so that only the order in which devices add may differ; float16 may underflow, too. A difference
# that is tolerated here is an error of twice as much in the squared norms, which stays below the tolerances of those.
FORGIVEN = {
    torch.float64: (1e-9, 1e-14),
    torch.float32: (1e-5, 1e-6),
    torch.bfloat16: (4e-3, 1e-4),
    torch.float16: (0.02, 1e-4),
}

# A row that differs by at most this part of itself may do so because the device adds in another order, layer after layer. For a
# wrong sample, the difference is at least half as large as the row.
NEARLY = 0.4


class MarkedReading:
    """The evidence that marks give about one tensor.

    Args:
        sketches: the sketches of its gradient in each pass, with the marks of :func:`sample_marks`.
        n: the number of samples.
        marks_per_pass: as for :func:`sample_marks`.
        forgiven: by which part of itself a row may differ; by default as much as the dtype's rounding explains.

    Attributes:
        first: the sketch of the plain pass, in which every sample's mark is one.
    """

    def __init__(
        self,
        sketches: Sequence[Sketch],
        n: int,
        marks_per_pass: int = MARKS_PER_PASS,
        forgiven: float | None = None,
    ):
        self.first, *self._marked = sketches
        self._sketches, self._n, self._marks_per_pass = sketches, n, marks_per_pass
        self._marks = sample_marks(n, marks_per_pass)[1:]
        usual, self._floor = FORGIVEN[torch.float16 if marks_per_pass == MARKS_PER_PASS_OF_HALF else self.first.dtype]
        self._forgiven = usual if forgiven is None else forgiven
        self._sizes: dict[int, Tensor] = {}

    def forgiving(self) -> MarkedReading:
        """The same reading with the largest tolerance that still rules out wrong samples."""
        return MarkedReading(self._sketches, self._n, self._marks_per_pass, NEARLY)

    @property
    def largest(self) -> float:
        """The largest magnitude of the gradient in the plain pass."""
        return float(self.first.largest)

    def sizes(self, axis: int) -> Tensor:
        """How large each slice along an axis is, ``[size]``."""
        if axis not in self._sizes:
            self._sizes[axis] = self.first.axes[axis].norm(dim=1)
        return self._sizes[axis]

    def fits(self, placement: Placement) -> bool:
        """Whether every row came back times the mark of its sample."""
        grouped = placement.layout in (Layout.BLOCKS, Layout.INTERLEAVED)
        if grouped and self._largest_row_contradicts(placement):
            return False
        rows, size = self.first.axes[placement.axis], self.sizes(placement.axis)
        sample_of_row = placement.sample_of_index(len(rows), self._n, rows.device)
        allowed = self._forgiven * size + self._floor * size.max()
        for mark, sketch in zip(self._marks, self._marked, strict=True):
            mark = mark.to(rows)
            mark = mark if sample_of_row is None else mark[sample_of_row.clamp(max=self._n - 1)]
            off = (sketch.axes[placement.axis] / mark[:, None] - rows).norm(dim=1)
            if not bool((off.isfinite() & (off <= allowed)).all()):
                return False
        return True

    def _largest_row_contradicts(self, placement: Placement) -> bool:
        """Whether the largest row came back with another factor than the mark that a grouped placement expects.

        Most shapes allow several such placements, at most one of which is right. A few numbers rule out the others.
        """
        rows, size = self.first.axes[placement.axis], self.sizes(placement.axis)
        row = int(size.argmax())
        sample = row // (len(rows) // self._n) if placement.layout is Layout.BLOCKS else row % self._n
        # The tolerance is a little larger here than for all rows together, which decide in the end.
        own, bound = rows[row].tolist(), 1.01 * (self._forgiven + self._floor) * float(size[row])
        for mark, sketch in zip(self._marks, self._marked, strict=True):
            factor = float(mark[sample])
            if not math.dist([x / factor for x in sketch.axes[placement.axis][row].tolist()], own) <= bound:
                return True
        return False

    def slice_fits(self, axis: int, sample: int) -> bool:
        """Whether the one slice that was sketched along an axis came back times the mark of a sample.

        The tolerance is a part of the slice plus a part of the largest slice. The size of the latter is bounded by that of all
        slices together, times four, since all are known only by their products with random directions.
        """
        own = self.first.slices[axis][1].tolist()
        norm = math.hypot(*[float(rows.norm()) for rows in self.first.axes.values()])
        allowed = 1.01 * (self._forgiven * math.hypot(*own) + 4 * self._floor * norm)
        for mark, sketch in zip(self._marks, self._marked, strict=True):
            factor = float(mark[sample])
            if not math.dist([x / factor for x in sketch.slices[axis][1].tolist()], own) <= allowed:
                return False
        return True

    def listed(self) -> Placement:
        """The placement of rows by their marks, assuming that each belongs to one sample; rows without a gradient get any."""
        rows = self.first.axes[0]
        sample = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
        for place, sketch in enumerate(self._marked):
            ratio = sketch.axes[0].norm(dim=1) / self.sizes(0)
            digit = ratio.log2().round().nan_to_num(0, 0, 0).clamp(0, self._marks_per_pass - 1)
            sample += digit.long() * self._marks_per_pass**place
        return Placement(0, Layout.INDEXED, sample)
