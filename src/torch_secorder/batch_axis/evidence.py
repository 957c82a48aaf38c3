"""Evidence for where a gradient has its samples: how it answers to marked samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

import torch
from torch import Tensor

from torch_secorder.autograd.precision import full_precision, is_half
from torch_secorder.batch_axis.placement import Layout, Placement


class Unplaced(Enum):
    """What else the evidence can say of a tensor."""

    SHARED_BY_SAMPLES = "it belongs to no single sample"
    NO_GRADIENT = "no gradient reaches it"


Evidence = Placement | Unplaced


# How many different factors one backward pass tells apart, in half precision and in other dtypes: 2^7 and 2^31 leave room.
MARKS_PER_PASS_OF_HALF, MARKS_PER_PASS = 8, 32


def sample_marks(n: int, marks_per_pass: int = MARKS_PER_PASS) -> list[Tensor]:
    """Factors for the samples, ``[n]`` each: ones, then a power of two for each digit of a sample's number.

    Two samples differ in at least one of them.
    """
    samples = torch.arange(n)
    digits = max(1, math.ceil(math.log(max(n, 2), marks_per_pass) - 1e-9))
    return [torch.ones(n), *(2.0 ** (samples // marks_per_pass**place % marks_per_pass) for place in range(digits))]


# What several samples share looks like one sample's by chance in one direction now and then, in half precision above all.
DIRECTIONS = 8


@dataclass(frozen=True)
class Sketch:
    """What is kept of a gradient to see where its samples are: every slice along every axis, in a few random directions.

    Powers of two that multiply a slice multiply its sketch, exactly as well, and whole gradients of a whole model would not
    fit into memory.

    Attributes:
        axes: for each axis of the tensor ``[size, DIRECTIONS]``, in float64.
        largest: the largest magnitude in the gradient.
        tiny: the smallest normal number of its dtype.
    """

    axes: list[Tensor]
    largest: float
    tiny: float

    @classmethod
    def of(cls, grad: Tensor) -> Sketch:
        """The sketch of a gradient."""
        value = grad.float() if is_half(grad) else grad
        largest = max(-float(value.min()), float(value.max())) if value.numel() else 0.0
        with full_precision():
            axes = [_contracted(value, axis).double() for axis in range(value.dim())]
        return cls(axes, largest, torch.finfo(grad.dtype).tiny)

    @property
    def shape(self) -> tuple[int, ...]:
        """The gradient's."""
        return tuple(len(rows) for rows in self.axes)


def _contracted(value: Tensor, axis: int) -> Tensor:
    """A few random numbers for each slice along an axis: random directions for the axes before it, and for those after."""
    before, size, after = math.prod(value.shape[:axis]), value.shape[axis], math.prod(value.shape[axis + 1 :])
    # The longer side first, which leaves little.
    if before < after:
        rows = _after(value.reshape(-1, after)).view(before, size, DIRECTIONS)
        return torch.einsum("bsd,bd->sd", rows, _directions(before, value))
    columns = _before(value.reshape(before, -1)).view(DIRECTIONS, size, after)
    return torch.einsum("dsa,ad->sd", columns, _directions(after, value))


LONG = (
    2**12
)  # Directions for a longer side are products of shorter ones, which would take as much memory as a gradient.


def _after(value: Tensor) -> Tensor:
    """``[rows, columns]`` -> ``[rows, DIRECTIONS]``, by directions for the columns."""
    if (columns := value.shape[1]) <= LONG:
        return value @ _directions(columns, value)
    whole = columns // LONG
    parts = value[:, : whole * LONG].unflatten(1, (whole, LONG)) @ _directions(LONG, value)
    along = torch.einsum("rpd,pd->rd", parts, _directions(whole, value))
    return along + _after(value[:, whole * LONG :]) if columns % LONG else along


def _before(value: Tensor) -> Tensor:
    """``[rows, columns]`` -> ``[DIRECTIONS, columns]``, by directions for the rows."""
    if (rows := value.shape[0]) <= LONG:
        return _directions(rows, value).mT @ value
    left, outer = _directions(LONG, value), _directions(-(-rows // LONG), value)
    parts = zip(value.split(LONG), outer, strict=True)
    return sum(((left[: len(part)] * factor).mT @ part for part, factor in parts), value.new_zeros(()))


@lru_cache(16)
def _random(size: int) -> Tensor:
    return torch.randn(size, DIRECTIONS, generator=torch.Generator().manual_seed(size))


def _directions(size: int, like: Tensor) -> Tensor:
    return _random(size).to(like)


def evidence(
    plain: Sketch | None, scaled: Sequence[Sketch | None], n: int, marks_per_pass: int = MARKS_PER_PASS
) -> Evidence:
    """What gradients for a seed, and for the seed times each of the :func:`sample_marks`, say of a tensor's samples."""
    found = [g for g in scaled if g is not None]
    if plain is None or len(found) < len(scaled):
        return Unplaced.NO_GRADIENT
    # What is smaller than the smallest normal number has few digits, and doubling brings some back.
    if not plain.largest > plain.tiny:
        return Unplaced.NO_GRADIENT
    # Of several axes that would do, the first with as many indices as samples is meant.
    shape = plain.shape
    layouts = [(Layout.ONE_EACH, axis) for axis in range(len(shape))]
    layouts += [(layout, axis) for axis in range(len(shape)) for layout in (Layout.BLOCKS, Layout.INTERLEAVED)]
    for layout, axis in layouts:
        placement = Placement(axis, layout)
        if placement.fits(shape, n) and (layout is Layout.ONE_EACH or shape[axis] != n):
            owner = placement.sample_of_index(shape[axis], n, plain.axes[axis].device)
            if _explains(plain.axes[axis], [g.axes[axis] for g in found], owner, n, marks_per_pass):
                return placement
    if not shape:
        return Unplaced.SHARED_BY_SAMPLES
    rows, others = plain.axes[0], [g.axes[0] for g in found]
    owner = _owners(rows, others, marks_per_pass)
    return (
        Placement(0, Layout.INDEXED, owner)
        if _explains(rows, others, owner, n, marks_per_pass)
        else Unplaced.SHARED_BY_SAMPLES
    )


def _explains(rows: Tensor, scaled: list[Tensor], owner: Tensor | None, n: int, marks_per_pass: int) -> bool:
    """Whether every row came back times the factors of its owner."""
    size = rows.norm(dim=1)
    # Powers of two leave every rounding as it was; only half precision may underflow. What several samples share may look like
    # one sample's by chance, the less likely the less is forgiven.
    forgiven = 0.05 if marks_per_pass == MARKS_PER_PASS_OF_HALF else 1e-3
    for factor, found in zip(sample_marks(n, marks_per_pass)[1:], scaled, strict=True):
        factor = factor.to(rows)
        factor = factor if owner is None else factor[owner.clamp(max=n - 1)]
        off = (found / factor[:, None] - rows).norm(dim=1)
        # A wrong owner is off by half of the row at least.
        if not bool((off.isfinite() & (off <= forgiven * size + 1e-4 * size.max())).all()):
            return False
    return True


def _owners(rows: Tensor, scaled: list[Tensor], marks_per_pass: int) -> Tensor:
    """The sample of each row, if each has one; rows without a gradient may belong to any."""
    owner = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    for place, found in enumerate(scaled):
        ratio = found.norm(dim=1) / rows.norm(dim=1)
        digit = ratio.log2().round().nan_to_num(0, 0, 0).clamp(0, marks_per_pass - 1)
        owner += digit.long() * marks_per_pass**place
    return owner
