"""The evidence for where a gradient has its samples: what marks on the samples do to it.

A backward pass starts with random numbers at the model's outputs, another one with the same numbers times a mark for each
sample. Where the gradient of the second is that of the first times sample n's mark, it belongs to sample n. Marks are powers
of two, which multiply without rounding, so that the two agree to the last digit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache, partial

import torch
from torch import Tensor

from torch_secorder.autograd.double_precision import in_double_precision
from torch_secorder.autograd.precision import full_precision, is_half
from torch_secorder.batch_axis.placement import FIRST, Layout, Placement


class Unplaced(Enum):
    """What the evidence can say of a tensor that has no placement."""

    SHARED_BY_SAMPLES = "it belongs to no single sample"
    NO_GRADIENT = "no gradient reaches it"
    NOT_FINITE = "its gradient is not finite"
    HIDDEN = "it lies behind a node that can't be looked through"


Evidence = Placement | Unplaced


@dataclass(frozen=True)
class Finding:
    """What one look shows of a tensor.

    Attributes:
        evidence: where its samples are, or why that is not known.
        proven: whether a look at another batch could not show anything else, as long as the model computes in the same way. Rows
            without a gradient fit any reading, so that a placement of theirs is right for this batch and proves nothing.
        others: the other placements that fit.
    """

    evidence: Evidence
    proven: bool = True
    others: tuple[Placement, ...] = ()


# How many marks one backward pass tells apart: 2^0 to 2^(B-1). With B = 8 in half precision and 32 in other dtypes, marked
# gradients stay inside the range of the dtype's exponents.
MARKS_PER_PASS_OF_HALF, MARKS_PER_PASS = 8, 32


def sample_marks(n: int, marks_per_pass: int = MARKS_PER_PASS) -> list[Tensor]:
    """The marks of all samples in each pass, ``[n]``: ones in the first pass, then powers of two.

    The exponents are the digits of the sample's number to the base ``marks_per_pass``, one digit in each pass, so that two
    samples differ in at least one of them.
    """
    return list(_sample_marks(n, marks_per_pass))


@lru_cache(16)  # A search asks for the same marks at each place.
def _sample_marks(n: int, marks_per_pass: int) -> tuple[Tensor, ...]:
    samples = torch.arange(n, dtype=torch.float64, device="cpu")
    digits = max(1, math.ceil(math.log(max(n, 2), marks_per_pass) - 1e-9))
    marks = (2.0 ** (samples // marks_per_pass**place % marks_per_pass) for place in range(digits))
    return torch.ones(n, dtype=torch.float32, device="cpu"), *(mark.float() for mark in marks)


# A marked row should be the plain row times its sample's mark. These are the differences that are forgiven, relative to the row
# and to the largest row. Powers of two leave every rounding as it was, so that only the order in which a device adds can make a
# difference, and in float16 numbers that are too small for it. A forgiven difference makes an error of twice its size in the
# squared norms, which is below their tolerances.
FORGIVEN = {
    torch.float64: (1e-9, 1e-12),
    torch.float32: (1e-5, 1e-6),
    torch.bfloat16: (4e-3, 1e-4),
    torch.float16: (0.02, 1e-4),
}

# A row that is smaller than this part of the largest row says nothing, since it fits any reading, or nearly so.
SPEAKS = 1e-3

# Along a single random direction, what samples share may scale as if it were one sample's by accident, in half precision above
# all; along several it does not.
DIRECTIONS = 8

# Directions for a longer side are products of shorter ones. Made in full, they would take as much memory as a gradient.
LONG = 2**12


@dataclass(frozen=True)
class Sketch:
    """What is kept of a gradient: for every slice along every axis, its products with a few random directions.

    The gradients of a whole model would not fit into memory. A power of two that multiplies a slice multiplies its products
    too, without rounding, so that they show the same.

    Attributes:
        axes: for each axis that may count samples the products of its slices, ``[size, DIRECTIONS]``, in float64.
        slices: for each axis of which one slice is looked at only, the slice's index and its products.
        shape: the gradient's shape.
        largest: the largest magnitude in the gradient.
        dtype: the gradient's, or that of its real and imaginary parts.
    """

    axes: dict[int, Tensor]
    slices: dict[int, tuple[int, list[float]]]
    shape: tuple[int, ...]
    largest: float
    dtype: torch.dtype

    @classmethod
    def of(cls, grad: Tensor, n: int, *, in_brief: bool = False, plain: Sketch | None = None) -> Sketch:
        """The sketch of a gradient.

        Args:
            grad: the gradient.
            n: the number of samples, which decides what axes may count them; the first may always, by a list.
            in_brief: look at the whole of the likeliest axes only, which are those with n indices, and at one slice along each
                other one, which nearly always shows that it belongs to no single sample.
            plain: the sketch of the gradient in the plain pass, if this is another one; the same slices are looked at.
        """
        value = grad.float() if is_half(grad) else grad
        if value.is_complex():  # Real marks multiply both parts.
            value = torch.view_as_real(value.resolve_conj())
        shape = tuple(grad.shape)
        largest = max(map(abs, torch.stack(torch.aminmax(value)).tolist())) if value.numel() else 0.0
        possible = [axis for axis, size in enumerate(shape) if size % n == 0 or not axis]
        whole = possible
        if in_brief and n > 1 and shape and value.numel():
            whole = [axis for axis in possible if shape[axis] == n] or [0]
        others = [axis for axis in possible if axis not in whole and shape[axis] % n == 0]
        with full_precision():
            axes = {axis: in_double_precision(_contracted(value, axis)) for axis in whole}
            slices = {}
            if others:
                indices = plain.indices if plain is not None else _indices_of_largest(value, whole[0], axes[whole[0]])
                slices = {axis: (indices[axis], _product(value.select(axis, indices[axis]))) for axis in others}
        return cls(axes, slices, shape, largest, grad.dtype.to_real())

    @property
    def indices(self) -> dict[int, int]:
        """For each axis of which one slice is looked at only, that slice's index."""
        return {axis: index for axis, (index, _) in self.slices.items()}

    @property
    def tiny(self) -> float:
        """The smallest normal number of the gradient's dtype."""
        return torch.finfo(self.dtype).tiny


def _indices_of_largest(value: Tensor, axis: int, rows: Tensor) -> dict[int, int]:
    """For each other axis the index of the largest entry in the largest row along an axis; slices through it are not zero."""
    row = value.select(axis, int(rows.square().sum(1).argmax()))
    place, indices = int(row.abs().argmax()), {}
    for other in reversed([other for other in range(value.dim()) if other != axis]):
        place, indices[other] = divmod(place, value.shape[other])
    return indices


def _product(part: Tensor) -> list[float]:
    """The products of a slice with random directions, ``[DIRECTIONS]``."""
    products: list[float] = _after(part.reshape(1, -1))[:, 0].tolist()
    return products


def _contracted(value: Tensor, axis: int) -> Tensor:
    """The products of each slice along an axis with random directions, ``[size, DIRECTIONS]``.

    A slice's direction is the product of one for the axes before the given one and one for those after it.
    """
    before, size, after = math.prod(value.shape[:axis]), value.shape[axis], math.prod(value.shape[axis + 1 :])
    # The longer side is contracted first, since little is left after that.
    if before < after:
        rows = _after(value.reshape(before * size, after)).view(DIRECTIONS, before, size)
        return torch.einsum("dbs,db->sd", rows, _directions(before, value))
    columns = _before(value.reshape(before, size * after)).view(DIRECTIONS, size, after)
    return torch.einsum("dsa,da->sd", columns, _directions(after, value))


def _after(value: Tensor) -> Tensor:
    """``[rows, columns]`` -> ``[DIRECTIONS, rows]``, by directions for the columns.

    With the few directions on the left, the product takes a third of the time that it takes with them on the right.
    """
    rows, columns = value.shape
    if columns <= LONG:
        return _directions(columns, value) @ value.mT
    whole = columns // LONG
    parts = _directions(LONG, value) @ value[:, : whole * LONG].reshape(rows * whole, LONG).mT
    along = torch.einsum("drp,dp->dr", parts.view(DIRECTIONS, rows, whole), _directions(whole, value))
    return along + _after(value[:, whole * LONG :]) if columns % LONG else along


def _before(value: Tensor) -> Tensor:
    """``[rows, columns]`` -> ``[DIRECTIONS, columns]``, by directions for the rows."""
    if (rows := value.shape[0]) <= LONG:
        return _directions(rows, value) @ value
    left, outer = _directions(LONG, value), _directions(-(-rows // LONG), value)
    parts = zip(value.split(LONG), outer.unbind(1), strict=True)
    return sum(((left[:, : len(part)] * factor[:, None]) @ part for part, factor in parts), value.new_zeros(()))


@lru_cache(16)
def _random(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(DIRECTIONS, size, generator=generator, dtype=torch.float32, device="cpu")


def _directions(size: int, like: Tensor) -> Tensor:
    return _random(size).to(like)


def evidence(
    plain: Sketch | None, marked: Sequence[Sketch | None], n: int, marks_per_pass: int = MARKS_PER_PASS
) -> Finding | None:
    """Where a tensor has its n samples, if its gradients show it; None where slices leave it open and whole axes may show it.

    Args:
        plain: the gradient in the pass in which every sample's mark is one.
        marked: the gradients in the other passes, with the further :func:`sample_marks`.
        n: how many samples.
        marks_per_pass: as for :func:`sample_marks`.
    """
    found = [sketch for sketch in marked if sketch is not None]
    if plain is None or len(found) < len(marked):
        return Finding(Unplaced.NO_GRADIENT)
    if not all(math.isfinite(sketch.largest) for sketch in (plain, *found)):
        return Finding(Unplaced.NOT_FINITE)
    # Numbers below the smallest normal one show nothing: they have few digits, and a mark that lifts them brings some back.
    if plain.largest <= plain.tiny:
        return Finding(Unplaced.NO_GRADIENT)
    if not all(_slice_contradicts(plain, found, n, marks_per_pass, axis) for axis in plain.slices):
        return None
    explain = partial(_explains, plain, found, n, marks_per_pass)
    possible = (placement for placement in candidates(plain.shape, n) if placement.axis in plain.axes)
    if fitting := [placement for placement in possible if explain(placement)]:
        proven = len(fitting) == 1 and _shows_every_sample(plain, fitting[0], n)
        return Finding(fitting[0], proven, tuple(fitting[1:]))
    if not plain.shape:
        return Finding(Unplaced.SHARED_BY_SAMPLES)
    if 0 not in plain.axes:
        return None
    sample_of_row = _samples_of_rows(plain.axes[0], [sketch.axes[0] for sketch in found], marks_per_pass)
    listed = Placement(0, Layout.INDEXED, sample_of_row)
    if not explain(listed):
        return Finding(Unplaced.SHARED_BY_SAMPLES)
    # A row without a gradient may be any sample's.
    size = plain.axes[0].norm(dim=1)
    return Finding(listed, proven=bool((size > SPEAKS * size.max()).all()))


def candidates(shape: Sequence[int], n: int) -> Iterator[Placement]:
    """The placements that a shape allows, but for lists: first the axes with an index for each sample, from the first one on."""
    yield from (Placement(axis) if axis else FIRST for axis, size in enumerate(shape) if size == n)
    for axis, size in enumerate(shape):
        for layout in (Layout.BLOCKS, Layout.INTERLEAVED):
            placement = Placement(axis, layout)
            if size != n and placement.fits(shape, n):
                yield placement


def _norm(plain: Sketch) -> float:
    """The norm of all products of a gradient with random directions."""
    return math.hypot(*[float(rows.norm()) for rows in plain.axes.values()])


def _slice_contradicts(plain: Sketch, marked: list[Sketch], n: int, marks_per_pass: int, axis: int) -> bool:
    """Whether the slice that is known of an axis came back by another factor than each mark that a placement gives to it.

    What is forgiven besides a part of the slice is a part of the largest one, which is taken to be as large as all of them are
    together, and four times that, since both are known by their products with random directions.
    """
    index, own = plain.slices[axis]
    forgiven, floor = FORGIVEN[torch.float16 if marks_per_pass == MARKS_PER_PASS_OF_HALF else plain.dtype]
    bound = 1.01 * (forgiven * math.hypot(*own) + 4 * floor * _norm(plain))
    each = plain.shape[axis] // n
    for sample in {index // each, index % n}:
        off = []
        for mark, sketch in zip(sample_marks(n, marks_per_pass)[1:], marked, strict=True):
            factor = float(mark[sample])
            off.append(math.dist([x / factor for x in sketch.slices[axis][1]], own))
        if all(x <= bound for x in off):
            return False
    return True


def _explains(plain: Sketch, marked: list[Sketch], n: int, marks_per_pass: int, placement: Placement) -> bool:
    """Whether every row came back times the mark of its sample."""
    grouped = placement.layout in (Layout.BLOCKS, Layout.INTERLEAVED)
    if grouped and _largest_row_contradicts(plain, marked, n, marks_per_pass, placement):
        return False
    rows = plain.axes[placement.axis]
    sample_of_row = placement.sample_of_index(len(rows), n, rows.device)
    size = rows.norm(dim=1)
    forgiven, floor = FORGIVEN[torch.float16 if marks_per_pass == MARKS_PER_PASS_OF_HALF else plain.dtype]
    for mark, sketch in zip(sample_marks(n, marks_per_pass)[1:], marked, strict=True):
        mark = mark.to(rows)
        mark = mark if sample_of_row is None else mark[sample_of_row.clamp(max=n - 1)]
        off = (sketch.axes[placement.axis] / mark[:, None] - rows).norm(dim=1)
        # For a wrong sample, the difference is at least half as large as the row.
        if not bool((off.isfinite() & (off <= forgiven * size + floor * size.max())).all()):
            return False
    return True


def _largest_row_contradicts(
    plain: Sketch, marked: list[Sketch], n: int, marks_per_pass: int, placement: Placement
) -> bool:
    """Whether the largest row alone came back by another factor than the mark that a placement in groups gives to it.

    Most shapes allow several such placements, of which one is right at most. A few numbers rule out the others.
    """
    rows = plain.axes[placement.axis]
    size = rows.norm(dim=1)
    row = int(size.argmax())
    sample = row // (len(rows) // n) if placement.layout is Layout.BLOCKS else row % n
    forgiven, floor = FORGIVEN[torch.float16 if marks_per_pass == MARKS_PER_PASS_OF_HALF else plain.dtype]
    # A little more is forgiven here than for all rows together, which have the last word.
    own, bound = rows[row].tolist(), 1.01 * (forgiven + floor) * float(size[row])
    for mark, sketch in zip(sample_marks(n, marks_per_pass)[1:], marked, strict=True):
        factor = float(mark[sample])
        if not math.dist([x / factor for x in sketch.axes[placement.axis][row].tolist()], own) <= bound:
            return True
    return False


def _shows_every_sample(plain: Sketch, placement: Placement, n: int) -> bool:
    """Whether every sample has a row that is large enough to speak against another reading."""
    size = plain.axes[placement.axis].norm(dim=1)
    sample = placement.sample_of_index(len(size), n, size.device)
    if sample is not None:
        size = size.new_zeros(n).scatter_reduce(0, sample.clamp(max=n - 1), size, "amax")
    return bool((size > SPEAKS * size.max()).all())


def _samples_of_rows(rows: Tensor, marked: list[Tensor], marks_per_pass: int) -> Tensor:
    """The sample of each row as its marks tell it, if each row has one; rows without a gradient may have any."""
    sample = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    for place, found in enumerate(marked):
        ratio = found.norm(dim=1) / rows.norm(dim=1)
        digit = ratio.log2().round().nan_to_num(0, 0, 0).clamp(0, marks_per_pass - 1)
        sample += digit.long() * marks_per_pass**place
    return sample
