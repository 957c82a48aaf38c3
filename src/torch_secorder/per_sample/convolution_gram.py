"""Sums over pairs of a convolution's positions, from the Gram matrix of its pixels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_secorder.per_sample.convolution_products import with_tall_maps
from torch_secorder.per_sample.profiles import profile_of

if TYPE_CHECKING:
    from torch_secorder.per_sample.convolution import Convolution


def gram_norms(form: Convolution) -> tuple[Tensor, Tensor]:
    """The squared norms as sums over pairs of positions, and their parts from equal positions, each ``[n]``."""
    seen, positions = _gram_matrices(form)
    terms = (seen * positions.view(seen.shape)).view(form.n, form.groups, *positions.shape[1:])
    return terms.sum((1, 2, 3)), terms.diagonal(dim1=2, dim2=3).sum((1, 2))


def gram_channels(form: Convolution) -> tuple[Tensor, Tensor]:
    """The sums of squares for each output channel, and their parts from equal positions, each ``[n, channels]``."""
    seen, positions = _gram_matrices(form)
    pixels = seen.reshape(positions.shape)
    g = with_tall_maps(form).g[:, 0].reshape(form.n * form.groups, -1, pixels.shape[1])
    sums, squares = ((g @ pixels) * g).sum(2), (g.square() * pixels.diagonal(dim1=1, dim2=2)[:, None]).sum(2)
    return sums.view(form.n, -1), squares.view(form.n, -1)


def _gram_matrices(form: Convolution) -> tuple[Tensor, Tensor]:
    """The Gram matrices of the patches, ``[n k, *map, *map]``, and of the output gradients, ``[n k, positions, positions]``.

    The sum over the taps adds up copies of the pixels' Gram matrix that are shifted along its diagonal, one axis of the
    kernel after the other.
    """
    tall = with_tall_maps(form)
    x, g = (value[:, 0].reshape(form.n * form.groups, -1, math.prod(value.shape[3:])) for value in (tall.x, tall.g))
    pixels, positions = x.mT @ x, g.mT @ g
    size = [*tall.x.shape[3:]]
    if any(tall.padding):
        sides = [side for p in reversed(tall.padding) for side in (p, p)]
        pixels = torch.nn.functional.pad(pixels.view(-1, *size, *size), sides * 2)
        size = [side + 2 * p for side, p in zip(size, tall.padding, strict=True)]
        pixels = pixels.view(-1, math.prod(size), math.prod(size))
    strides = [math.prod(size[axis + 1 :]) for axis in range(len(size))]
    for kernel, gap, stride in zip(form.shape[2:], form.dilation, strides, strict=True):
        if kernel > 1:
            pixels = _sum_along_diagonal(pixels, kernel, gap * stride)
    (outer, row, _), steps = pixels.stride(), [a * b for a, b in zip(tall.stride, strides, strict=True)]
    out = tall.g.shape[3:]
    seen = pixels.as_strided((len(pixels), *out, *out), (outer, *(row * step for step in steps), *steps))
    return seen, positions


def _sum_along_diagonal(matrices: Tensor, taps: int, step: int) -> Tensor:
    """The sum of ``taps`` copies, each shifted ``step`` further along the diagonal."""
    length = matrices.shape[1] - (taps - 1) * step
    if not profile_of(matrices.device).has_caches:  # One call does it there.
        (outer, row, column), size = matrices.stride(), (len(matrices), length, length, taps)
        return matrices.as_strided(size, (outer, row, column, step * (row + column))).sum(3)
    shifts = (slice(tap * step, tap * step + length) for tap in range(taps))
    first, second, *others = (matrices[:, shift, shift] for shift in shifts)
    total = first + second
    for other in others:
        total += other
    return total
