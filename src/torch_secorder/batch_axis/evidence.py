"""The evidence for where a gradient has its samples, whichever way it was looked at: by marks or by silence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

from torch import Tensor

from torch_secorder.batch_axis.marks import MARKS_PER_PASS, MarkedReading
from torch_secorder.batch_axis.placement import FIRST, Layout, Placement
from torch_secorder.batch_axis.silence import SilentReading
from torch_secorder.batch_axis.sketch import Sketch


class Unplaced(Enum):
    """What the evidence can say of a tensor that has no placement."""

    SHARED_BY_SAMPLES = "it belongs to no single sample"
    NO_GRADIENT = "no gradient reaches it"
    NOT_REACHED = "no way leads to it from an output that shows samples"
    NOT_FINITE = "its gradient is not finite"
    HIDDEN = "it lies behind a node that can't be looked through"


Evidence = Placement | Unplaced

# What is said where no gradient comes: the numbers of one batch decide it, or the graph itself does.
SILENT = frozenset([Unplaced.NO_GRADIENT, Unplaced.NOT_REACHED])


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


class Doubt(NamedTuple):
    """Why an output may have its samples on another axis than the first.

    Attributes:
        shape: its shape.
        axis: the other axis.
        contradiction: what contradicts that the samples are on the first axis, in words; nothing if both axes are possible.
    """

    shape: tuple[int, ...]
    axis: int
    contradiction: str


class Open(Enum):
    """What a look leaves open, and which other one shows it."""

    AXES = "of some axes one slice was looked at, and they may count the samples: whole axes show it"
    ROUNDING = "the device may add in another order each time: silence shows it"


Reading = MarkedReading | SilentReading

# A row that is smaller than this part of the largest fits any reading, or nearly so.
SPEAKS = 1e-3


def evidence(
    sketches: Sequence[Sketch | None], n: int, marks_per_pass: int = MARKS_PER_PASS, *, by_silence: bool = False
) -> Finding | Open:
    """Where a tensor has its n samples, if its gradients show it.

    Args:
        sketches: the gradients in the passes of one look, on the host.
        n: how many samples.
        marks_per_pass: as for :func:`sample_marks`.
        by_silence: whether the passes are those of :func:`loud_samples`, and not of :func:`sample_marks`.
    """
    found = [sketch for sketch in sketches if sketch is not None]
    if len(found) < len(sketches):
        return Finding(Unplaced.NO_GRADIENT)
    if not all(math.isfinite(sketch.largest) for sketch in found):
        return Finding(Unplaced.NOT_FINITE)
    reading = SilentReading(found, n) if by_silence else MarkedReading(found, n, marks_per_pass)
    # Numbers below the smallest normal one have few digits, and a mark brings some back: they show nothing.
    if reading.largest <= reading.first.tiny:
        return Finding(Unplaced.NO_GRADIENT)
    if any(_slice_fits(reading, axis, n) for axis in reading.first.slices):
        return Open.AXES
    if (placed := _placed(reading, n)) is not None:
        return placed
    if isinstance(reading, MarkedReading) and (left_open := _left_open_by_rounding(reading.forgiving(), n)) is not None:
        return left_open
    if reading.first.shape and 0 not in reading.first.axes:
        return Open.AXES
    return Finding(Unplaced.SHARED_BY_SAMPLES)


def _placed(reading: Reading, n: int) -> Finding | None:
    """The placement that explains what came back; None if none does."""
    first = reading.first
    possible = (placement for placement in candidates(first.shape, n) if placement.axis in first.axes)
    fitting = [placement for placement in possible if reading.fits(placement)]
    proven = len(fitting) == 1 and _shows_every_sample(reading.sizes(fitting[0].axis), fitting[0], n)
    if fitting and (proven or not is_of_features(fitting[0], first.shape)):
        return Finding(fitting[0], proven, tuple(fitting[1:]))
    if 0 not in first.axes:
        return None
    return _listed(reading) or (Finding(fitting[0], proven, tuple(fitting[1:])) if fitting else None)


def is_of_features(placement: Placement, shape: Sequence[int]) -> bool:
    """Whether a placement is on the last of several axes, where layers have features.

    Where most rows have no gradient, the few features that have one fit a placement there as well as rows do. Both give every
    entry to the same sample, but no layer's rule takes apart its features.
    """
    return 0 < placement.axis == len(shape) - 1


def _listed(reading: Reading) -> Finding | None:
    """Samples row by row, in any order, if that explains what came back."""
    listed = reading.listed()
    if listed.sample_index is None or not reading.fits(listed):
        return None
    # A row without a gradient may be any sample's.
    size = reading.sizes(0)
    there = replace(listed, sample_index=listed.sample_index.to(reading.first.device))
    return Finding(there, proven=bool((size > SPEAKS * size.max()).all()))


def _left_open_by_rounding(reading: MarkedReading, n: int) -> Open | None:
    """What is left open if something explains what came back when all is forgiven that may be rounding.

    A single slice is easily explained, by one large entry in it, and a look at whole axes may cost less than silence does. A CPU
    adds in the same order each time, so that slices which do not fit there belong to no placement.
    """
    if _placed(reading, n) is not None:
        return Open.ROUNDING
    first = reading.first
    slices = first.slices if first.device.type != "cpu" else ()
    return Open.AXES if any(_slice_fits(reading, axis, n) for axis in slices) else None


def candidates(shape: Sequence[int], n: int) -> Iterator[Placement]:
    """The placements that a shape allows, but for lists: first the axes with an index for each sample, from the first one on."""
    yield from (Placement(axis) if axis else FIRST for axis, size in enumerate(shape) if size == n)
    for axis, size in enumerate(shape):
        for layout in (Layout.BLOCKS, Layout.INTERLEAVED):
            placement = Placement(axis, layout)
            if size != n and placement.fits(shape, n):
                yield placement


def _slice_fits(reading: Reading, axis: int, n: int) -> bool:
    """Whether the slice that is known of an axis may be that of a sample to which some placement gives it."""
    index, each = int(reading.first.slices[axis][0]), reading.first.shape[axis] // n
    return any(reading.slice_fits(axis, sample) for sample in {index // each, index % n})


def _shows_every_sample(size: Tensor, placement: Placement, n: int) -> bool:
    """Whether every sample has a row that is large enough to speak against another reading."""
    sample = placement.sample_of_index(len(size), n, size.device)
    if sample is not None:
        size = size.new_zeros(n).scatter_reduce(0, sample.clamp(max=n - 1), size, "amax")
    return bool((size > SPEAKS * size.max()).all())
