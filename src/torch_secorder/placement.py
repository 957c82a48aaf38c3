"""Where a tensor has its samples: the batch axis, and the sample that each of its indices belongs to.

Shapes can lie: a batch as large as a sequence is long, windows or heads folded into the batch, positions without a batch
axis at all. The evidence that can't is the gradient itself. Send a random seed r back from the model's outputs, and then the
same seed with sample n's part multiplied by w_n, a power of two of its own: what belongs to sample n comes back multiplied by
w_n, exactly, since powers of two multiply without rounding. What belongs to several samples does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grouping:
    """How several rows fall to each of n samples: the runs, turns or list of :class:`Placement`."""

    n: int
    fold: str
    listed: Tensor | None = None

    def rows(self, value: Tensor) -> Tensor:
        """``[rows, ...]`` -> ``[n, most rows of one sample, ...]``, padded with zeros."""
        if self.listed is None:
            outer = self.fold == "outer"
            return value.unflatten(0, (self.n, -1)) if outer else value.unflatten(0, (-1, self.n)).transpose(0, 1)
        owner = self.listed
        counts = torch.bincount(owner, minlength=self.n)
        order = owner.argsort(stable=True)
        most = int(counts.max())
        if bool((counts == most).all()):
            return value[order].unflatten(0, (self.n, most))
        place = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner[order]]
        return value.new_zeros(self.n, most, *value.shape[1:]).index_put((owner[order], place), value[order])

    def sums(self, value: Tensor) -> Tensor:
        """``[rows, ...]`` -> ``[n, ...]``, the sums over each sample's rows."""
        if self.listed is None:
            return self.rows(value).sum(1)
        return value.new_zeros(self.n, *value.shape[1:]).index_add(0, self.listed, value)


@dataclass(frozen=True)
class Placement:
    """Which axis counts samples, and how.

    Attributes:
        axis: the axis.
        fold: "none" if index n is sample n; "outer" if each sample has a run of neighbouring indices; "inner" if the
            samples alternate; "listed" if only a list tells, as behind a router.
        listed: for "listed", the sample of each index.
    """

    axis: int = 0
    fold: str = "none"
    listed: Tensor | None = None

    def fits(self, shape: Sequence[int], n: int) -> bool:
        """Whether a tensor of this shape can be placed so."""
        size = shape[self.axis] if len(shape) > self.axis else 0
        if self.listed is not None:
            return size == len(self.listed)
        return size == n if self.fold == "none" else size > 0 and size % n == 0

    @property
    def whole(self) -> bool:
        """Whether all of the tensor belongs to one sample: a module that was called for each sample in turn."""
        return self.listed is not None and bool((self.listed == self.listed[0]).all())

    def grouping(self, size: int, n: int, device: torch.device) -> Grouping | None:
        """How ``size`` indices fall to n samples; None if index n is sample n."""
        return (
            None
            if self.fold == "none"
            else Grouping(n, self.fold, self.listed if self.listed is None else self.listed.to(device))
        )

    def owner(self, size: int, n: int, device: torch.device) -> Tensor | None:
        """The sample of each index, ``[size]``; None if index n is sample n."""
        if self.listed is not None:
            return self.listed.to(device)
        if self.fold == "none":
            return None
        samples = torch.arange(n, device=device)
        return samples.repeat_interleave(size // n) if self.fold == "outer" else samples.repeat(size // n)


FIRST = Placement()  # index n of the first axis is sample n


class Unplaced(Enum):
    """What else the evidence can say of a tensor."""

    SHARED = "it belongs to no single sample"
    NOTHING = "no gradient reaches it"


Evidence = Placement | Unplaced


# How many different factors one backward pass tells apart, in half precision and in other dtypes: 2^7 and 2^31 leave room.
BASE_OF_HALF, BASE = 8, 32


def factors(n: int, base: int = BASE) -> list[Tensor]:
    """Factors for the samples, ``[n]`` each: ones, then a power of two for each digit of a sample's number.

    Two samples differ in at least one of them.
    """
    samples = torch.arange(n)
    digits = max(1, math.ceil(math.log(max(n, 2), base) - 1e-9))
    return [torch.ones(n), *(2.0 ** (samples // base**place % base) for place in range(digits))]


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
        value = grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad
        largest = max(-float(value.min()), float(value.max())) if value.numel() else 0.0
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


def evidence(plain: Sketch | None, scaled: Sequence[Sketch | None], n: int, base: int = BASE) -> Evidence:
    """What gradients for a seed, and for the seed times each of the :func:`factors`, say of a tensor's samples."""
    found = [g for g in scaled if g is not None]
    if plain is None or len(found) < len(scaled):
        return Unplaced.NOTHING
    # What is smaller than the smallest normal number has few digits, and doubling brings some back.
    if not plain.largest > plain.tiny:
        return Unplaced.NOTHING
    # Of several axes that would do, the first with as many indices as samples is meant.
    shape = plain.shape
    folds = [("none", axis) for axis in range(len(shape))]
    folds += [(fold, axis) for axis in range(len(shape)) for fold in ("outer", "inner")]
    for fold, axis in folds:
        placement = Placement(axis, fold)
        if placement.fits(shape, n) and (fold == "none" or shape[axis] != n):
            owner = placement.owner(shape[axis], n, plain.axes[axis].device)
            if _explains(plain.axes[axis], [g.axes[axis] for g in found], owner, n, base):
                return placement
    if not shape:
        return Unplaced.SHARED
    rows, others = plain.axes[0], [g.axes[0] for g in found]
    owner = _owners(rows, others, base)
    return Placement(0, "listed", owner) if _explains(rows, others, owner, n, base) else Unplaced.SHARED


def _explains(rows: Tensor, scaled: list[Tensor], owner: Tensor | None, n: int, base: int) -> bool:
    """Whether every row came back times the factors of its owner."""
    size = rows.norm(dim=1)
    # Powers of two leave every rounding as it was; only half precision may underflow. What several samples share may look like
    # one sample's by chance, the less likely the less is forgiven.
    forgiven = 0.05 if base == BASE_OF_HALF else 1e-3
    for factor, found in zip(factors(n, base)[1:], scaled, strict=True):
        factor = factor.to(rows)
        factor = factor if owner is None else factor[owner.clamp(max=n - 1)]
        off = (found / factor[:, None] - rows).norm(dim=1)
        # A wrong owner is off by half of the row at least.
        if bool((off > forgiven * size + 1e-4 * size.max()).any()):
            return False
    return True


def _owners(rows: Tensor, scaled: list[Tensor], base: int) -> Tensor:
    """The sample of each row, if each has one; rows without a gradient may belong to any."""
    owner = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    for place, found in enumerate(scaled):
        ratio = found.norm(dim=1) / rows.norm(dim=1)
        digit = ratio.log2().round().nan_to_num(0, 0, 0).clamp(0, base - 1)
        owner += digit.long() * base**place
    return owner
