"""The weight gradients of a convolution as matrix products: of shifted rows of the map, or of unfolded patches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_secorder.per_sample.arithmetic import joined, total_of
from torch_secorder.per_sample.costs import FILLED
from torch_secorder.per_sample.outer import Outer

if TYPE_CHECKING:
    from torch_secorder.per_sample.convolution import Convolution


def with_tall_maps(form: Convolution) -> Convolution:
    """The same gradients with each sample's r maps stacked along the first axis into one, with zeros between them."""
    if form.x.shape[1] == 1:
        return form
    padding, step, above = form.padding[0], form.stride[0], [0, 0] * (len(form.stride) - 1)
    below = padding + -(form.x.shape[3] + 2 * padding) % step
    x = torch.nn.functional.pad(form.x, [*above, padding, below])
    gap = x.shape[3] // step - form.g.shape[3]
    g = torch.nn.functional.pad(form.g, [*above, 0, gap])
    x, g = (value.transpose(1, 2).flatten(2, 3)[:, None] for value in (x, g))
    g = g.narrow(3, 0, g.shape[3] - gap)
    return type(form)(x, g, form.shape, form.stride, [0, *form.padding[1:]], form.dilation, form.groups)


def shifted_products(form: Convolution) -> Iterator[Tensor]:
    """The gradients for the kernel's slices along its first axis, in turn, each ``[n k, i * other taps, o]``.

    Patches are unfolded along all axes but the first. Along the first axis, the positions that a tap meets lie next to
    each other in memory, so that each slice is a matrix product of a view and no row is copied once for each tap. With a
    stride, the rows are sorted by their remainder first.
    """
    if form.sizes.unfolds_all:
        return iter(one_product(form).unflatten(1, (form.shape[2], -1)).unbind(1))
    tall = with_tall_maps(form)
    x, g, step = tall.x[:, 0], tall.g[:, 0], tall.stride[0]
    dims = len(tall.stride)
    sides = [side for p in reversed(tall.padding) for side in (p, p)]
    sides[-1] += -(x.shape[2] + 2 * tall.padding[0]) % step
    x = torch.nn.functional.pad(x, sides) if any(sides) else x
    x = _unfolded(x, tall, range(1, dims))
    # [n, channels, rows, *other axes, *other taps] -> [remainder, n k, i other taps, rows and other axes]
    x = x.unflatten(2, (-1, step)).movedim(3, 0)
    axes, taps = range(3, dims + 3), range(dims + 3, 2 * dims + 2)
    x = x.permute(0, 1, 2, *taps, *axes).reshape(step, form.n * form.groups, -1, math.prod(x.shape[3 : dims + 3]))
    g = g.reshape(form.n * form.groups, -1, math.prod(g.shape[2:]))
    row = g.shape[2] // tall.g.shape[3]
    starts = [divmod(tap * tall.dilation[0], step) for tap in range(form.shape[2])]
    return (_product(x[rest, :, :, skip * row : skip * row + g.shape[2]], g) for skip, rest in starts)


def squares_of_products(parts: Iterable[Convolution]) -> tuple[Tensor, Tensor]:
    """The squares of :func:`shifted_products`, added up over the samples, and over the entries of each sample.

    Returns ``[taps along the first axis, k, i * other taps, o]`` and ``[n]``.
    """
    sums: list[Tensor] = []
    norms: list[Tensor] = []
    for part in parts:
        new, of_samples = [], []
        for value in shifted_products(part):
            squares = value.square().unflatten(0, (part.n, -1))
            new.append(squares.sum(0))
            of_samples.append(squares.flatten(1).sum(1))
        norms.append(total_of(of_samples))
        sums = [old + value for old, value in zip(sums, new, strict=True)] if sums else new
    return torch.stack(sums), joined(norms)


def one_product(form: Convolution) -> Tensor:
    """The gradients as one product with patches unfolded along all axes, ``[n k, taps along the first axis * i * others, o]``."""
    tall = with_tall_maps(form)
    g, dims = tall.g[:, 0], len(tall.stride)
    x = torch.nn.functional.pad(tall.x[:, 0], [side for p in reversed(tall.padding) for side in (p, p)])
    x = _unfolded(x, tall, range(dims))
    # [n, channels, *axes, *taps] -> [n k, taps along the first axis and i and other taps, positions]
    x = x.unflatten(1, (form.groups, -1))
    axes, taps = range(3, dims + 3), range(dims + 3, 2 * dims + 3)
    x = x.permute(0, 1, taps[0], 2, *taps[1:], *axes).reshape(form.n * form.groups, -1, math.prod(g.shape[2:]))
    g = g.reshape(len(x), -1, x.shape[2])
    # A second factor that fills its registers makes up for one with more rows.
    return _product(x, g) if g.shape[1] % FILLED else x @ g.mT


def _unfolded(x: Tensor, form: Convolution, axes: Iterable[int]) -> Tensor:
    """A padded map with the patches along some axes, whose taps become further axes at the end."""
    for axis in axes:
        gap = form.dilation[axis]
        x = x.unfold(axis + 2, gap * (form.shape[axis + 2] - 1) + 1, form.stride[axis])[..., ::gap]
        x = x.narrow(axis + 2, 0, form.g.shape[axis + 3])
    return x


def patches(form: Convolution) -> Outer:
    """The same gradients as products over positions, whose inputs are the patches that the kernel saw."""
    dims = len(form.stride)
    x, g = form.x.flatten(0, 1), form.g.flatten(0, 1)
    windows = torch.nn.functional.pad(x, [side for p in reversed(form.padding) for side in (p, p)])
    windows = _unfolded(windows, form, range(dims))
    # [n r, channels, *map, *kernel] -> [n, k, r t, i]
    windows = windows.unflatten(1, (form.groups, -1)).movedim(2, dims + 2)
    a = windows.reshape(form.n, -1, form.groups, math.prod(g.shape[2:]), math.prod(form.shape[1:]))
    g = g.reshape(form.n, -1, form.groups, form.shape[0] // form.groups, a.shape[3]).mT
    return Outer(a.transpose(1, 2).flatten(2, 3), g.transpose(1, 2).flatten(2, 3), form.shape)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.mT``, with the factors exchanged and the result transposed where that is faster.

    The factor with more rows should come first (up to three times faster), but a factor that fills no vector register should not
    come second (up to four times faster). This was measured with AVX-512; with AVX2 it matters less.
    """
    fewer, more = sorted((a.shape[-2], b.shape[-2]))
    first = fewer if fewer < FILLED else more
    return a @ b.mT if a.shape[-2] == first else (b @ a.mT).mT
