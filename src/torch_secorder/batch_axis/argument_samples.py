"""Where a tensor has the samples of one of the model's arguments that it was made of, whatever its gradient suggests.

A view of an argument tells by its place in memory. A copy of it, or of one step of it, tells by its numbers: those of each sample
have the same mean, spread and largest one, whichever way they lie, also after a cast, after repetitions, and up to one scale and
shift; up to one of each feature, if the features are on the last axis, where all of them are brought to one scale first. Where
something else was concatenated with a copy, such as the time of a step, the first or the last features tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torch_secorder.autograd.double_precision import together_on_host, widest_dtype
from torch_secorder.autograd.precision import is_half
from torch_secorder.batch_axis.evidence import candidates
from torch_secorder.batch_axis.labels import Labels
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.batch_axis.readings import labels_of
from torch_secorder.model.ranks import is_dtensor

Figures = npt.NDArray[np.float64]

# How many places in memory are looked at, at most: one for each row of a tensor that has no axis for the samples.
MOST_PLACES = 2**22
# How many figures of steps are compared, at most.
MOST_FIGURES = 2**16
# By how much the figures of a sample may differ where its numbers were cast, scaled and shifted.
FORGIVEN, FORGIVEN_OF_HALF = 1e-4, 2e-2
# What is smaller than this part of the numbers is their rounding.
ROUNDING = 1e-9
# The smallest spread of a feature, as a part of its numbers, of which a copy of one scale has the digits that are compared.
SMALLEST_SPREAD, SMALLEST_SPREAD_OF_HALF = 1e-3, 0.2


@dataclass(frozen=True, eq=False)
class ArgumentSamples:
    """One of the model's arguments, which has its samples on one axis.

    Attributes:
        value: the argument.
        axis: the axis.
    """

    value: Tensor
    axis: int

    def labels_by_memory(self, x: Tensor) -> Labels | None:
        """The sample that each entry of a view of the argument is of; None for what is no view, or does not tell."""
        if not self.shares_memory(x):
            return None
        own, n = self.value, self.value.shape[self.axis]
        step = own.stride(self.axis)
        if step == 0 or not _are_apart(own, self.axis):
            return None
        place, inside = np.full((1,) * x.dim(), x.storage_offset() - own.storage_offset()), 0
        for axis, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
            if inside + (size - 1) * stride < step:
                inside += (size - 1) * stride  # Unless it begins in the middle of a sample, it stays in this one.
            elif place.size * size > MOST_PLACES:
                return None
            else:
                place = place + (np.arange(size) * stride).reshape([-1 if one == axis else 1 for one in range(x.dim())])
        extent = sum((size - 1) * stride for size, stride in zip(own.shape, own.stride(), strict=True))
        # A batch may be a part of a larger tensor itself.
        is_part = place.min() >= 0 and place.max() + inside <= extent
        stays = bool((place % step + inside < step).all())
        return place // step % n if is_part and stays else None

    def shares_memory(self, x: Tensor) -> bool:
        """Whether a tensor is a view of the argument, as far as tensors of its class show it."""
        own = self.value
        if type(x) is not Tensor or type(own) is not Tensor or x.dtype != own.dtype or not x.numel():
            return False
        return x.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()

    @cached_property
    def figures(self) -> Tensor:
        """The figures of the samples, and those of each step along another axis but the last, ``[1 + steps, 5, n]``."""
        first = self.value.movedim(self.axis, 0)
        found = [figures_of(first[None])]
        for axis in range(1, first.dim() - 1):
            if first.shape[axis] * first.shape[0] <= MOST_FIGURES:
                found.append(figures_of(first.movedim(axis, 0)))
        return torch.cat(found)


def labels_in(operands: Sequence[Tensor], arguments: Sequence[ArgumentSamples], n: int) -> list[list[Labels]]:
    """For each of some tensors what is found of the samples of an argument in it, if it was made of one; the host waits once."""
    arguments = [one for one in arguments if shows_numbers(one.value) and one.value.shape[one.axis] == n > 1]
    known = [[own for one in arguments if (own := one.labels_by_memory(x)) is not None] for x in operands]
    places: list[tuple[int, Placement]] = []
    figures = [one.figures for one in arguments]
    for number, x in enumerate(operands):
        # What requires a gradient was computed from parameters, or else shares the memory of an argument that requires one, too.
        if not arguments or known[number] or x.requires_grad or not shows_numbers(x):
            continue
        for placement in candidates(x.shape, n):
            for part in (x, *_parts_like_arguments(x, placement.axis, arguments)):
                places.append((number, placement))
                figures.append(figures_of(rows_of(part, placement, n)[None])[0])
    on_host: list[Figures] = [one.numpy() for one in together_on_host(figures)]
    shown = on_host[len(arguments) :]
    with np.errstate(all="ignore"):  # Numbers that are not finite are like none.
        given = [one for several in on_host[: len(arguments)] for figures in several for one in _without_scale(figures)]
        for (number, placement), of_rows in zip(places, shown, strict=True):
            x, own_figures = operands[number], _without_scale(of_rows)
            forgiven = FORGIVEN_OF_HALF if is_half(x) else FORGIVEN
            pairs = product(own_figures, given)
            if any(_are_alike(own, one, forgiven) and tell_samples(one, forgiven) for own, one in pairs):
                known[number].append(labels_of(placement, x.shape, n))
    return known


def _parts_like_arguments(x: Tensor, sample_axis: int, arguments: Sequence[ArgumentSamples]) -> Iterator[Tensor]:
    """The first and the last features of a tensor, as many as an argument has that is smaller along one axis alone.

    These are the argument's own where something else, such as the time of a step, was concatenated with it.
    """
    shapes = {tuple(one.value.shape) for one in arguments if one.value.dim() == x.dim()}
    for shape in sorted(shapes):
        larger = [axis for axis, (size, own) in enumerate(zip(x.shape, shape, strict=True)) if size != own]
        if len(larger) == 1 and larger[0] != sample_axis and x.shape[larger[0]] > (size := shape[larger[0]]):
            yield x.narrow(larger[0], 0, size)
            yield x.narrow(larger[0], -size, size)


def shows_numbers(x: Tensor) -> bool:
    """Whether a tensor is one of real numbers, all of which are here."""
    if x.layout is not torch.strided or x.is_nested or x.is_quantized or x.is_meta or is_dtensor(x) or not x.numel():
        return False
    return is_half(x) or x.dtype in (torch.float32, torch.float64, torch.uint8, torch.int16, torch.int32, torch.int64)


def _are_apart(x: Tensor, axis: int) -> bool:
    """Whether the samples along an axis lie one after another in memory, or again and again in the same turn."""
    step, n = x.stride(axis), x.shape[axis]
    others = [
        (size, stride)
        for other, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True))
        if other != axis and size > 1
    ]
    inside = sum((size - 1) * stride for size, stride in others if stride < step)
    return inside < step and all(stride % (step * n) == 0 for _, stride in others if stride >= step)


def rows_of(x: Tensor, placement: Placement, n: int) -> Tensor:
    """What belongs to each sample, ``[n, ...]``."""
    rows, grouping = x.detach().movedim(placement.axis, 0), placement.grouping(n, x.device)
    return rows if grouping is None else grouping.rows(rows)


def figures_of(steps: Tensor) -> Tensor:
    """Figures of each row of each step, ``[steps, n, ...]`` -> ``[steps, 5, n]``, on their device.

    They are the mean, the mean square and the largest of a row's numbers, and the mean and the largest of the squares that these
    have when each feature's mean over its step is 0 and its variance 1.
    """
    wide = widest_dtype(steps.device)
    steps = steps.detach()[..., None] if steps.dim() == 2 else steps.detach()
    steps = steps if steps.is_floating_point() else steps.to(wide)
    axes = list(range(2, steps.dim()))
    squares = torch.linalg.vector_norm(steps, 2, axes, dtype=wide).square() / math.prod(steps.shape[2:])
    own = _of_one_scale(steps).square()
    found = [steps.mean(axes, dtype=wide), squares, steps.amax(axes), own.mean(axes), own.amax(axes)]
    return torch.stack([one.to(wide) for one in found], 1)


def _of_one_scale(steps: Tensor) -> Tensor:
    """Numbers ``[steps, n, ..., features]`` with the mean 0 and the variance 1 in each feature of each step."""
    smallest = SMALLEST_SPREAD_OF_HALF if is_half(steps) else SMALLEST_SPREAD
    steps = steps.to(widest_dtype(steps.device))
    over = list(range(1, steps.dim() - 1))
    spread, mean = torch.std_mean(steps, over, correction=0, keepdim=True)
    # Of a feature that hardly changes, as much is rounding.
    shown = spread > smallest * (spread.square() + mean.square()).sqrt()
    return torch.where(shown, (steps - mean) / spread, 0)


def tell_samples(figures: Figures, forgiven: float) -> bool:
    """Whether the figures of any two samples differ. Those of a few padded ones may be met by chance along another axis."""
    return len(np.unique(np.round(figures / forgiven), axis=1).T) == figures.shape[1]


def _are_alike(own: Figures, others: Figures, forgiven: float) -> bool:
    return own.shape == others.shape and bool(np.abs(own - others).max() <= forgiven)


def _without_scale(figures: Figures) -> tuple[Figures, Figures]:
    """Figures that are the same for numbers with another scale and shift, and with others of each feature."""
    means, squares, largest = figures[:3]
    size = np.sqrt(squares.max())
    spread = np.sqrt(np.maximum(squares - means**2, 0))
    spread = np.where(spread > math.sqrt(ROUNDING) * size, spread, 0)
    found = []
    for value in (means - means.mean(), spread):
        norm = float(np.linalg.norm(value))
        found.append(value / norm if norm > ROUNDING * size else np.zeros_like(value))
    of_all = np.stack([*found, np.divide(largest - means, spread, out=np.zeros_like(means), where=spread > 0)])
    return of_all, figures[3:] / max(1.0, float(figures[3:].max()))
