"""Sketches of gradients that are kept during a search for samples: their products with a few random directions.

The gradients of a whole model would not fit into memory. Sketches stay on the device until the search is over, and then go to the
host in one copy, so that the host does not wait for the device in between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from torch_secorder.autograd.double_precision import together_on_host
from torch_secorder.autograd.precision import full_precision, is_half

# Along a single random direction, entries that samples share may scale by accident as if they were one sample's, above all in
# half precision. Along several directions they do not.
DIRECTIONS = 8

# Directions for a longer side are products of shorter ones. Made in full, they would take as much memory as a gradient.
LONG = 2**12

# This many numbers in half precision are widened at once. Widened in full, logits would take more memory than a step does.
WIDENED = 2**24

# In tensors of more than SMALL entries, the largest entry is searched in rows of at least ROW entries: first the row, then the
# entry. For small tensors that would take more calls.
SMALL, ROW = 2**16, 512

# Whole numbers up to this one are exact in single precision, in which indices travel to the host.
EXACT = 2**24


@dataclass(frozen=True)
class Sketch:
    """A sketch of a gradient: for the slices along every axis, their products with a few random directions.

    A power of two that multiplies a slice multiplies its products without rounding, too, and a slice of zeros has products of
    zero. So the products show the same as the slices.

    Attributes:
        axes: for each axis that may count samples, the products of its slices, ``[size, DIRECTIONS]``.
        slices: for each axis with only one sketched slice, the slice's index, ``[1]``, and its products.
        shape: the gradient's shape.
        largest: the largest magnitude in the gradient, one number.
        dtype: the gradient's dtype, or that of its real and imaginary parts.
        device: the gradient's device.
    """

    axes: dict[int, Tensor]
    slices: dict[int, tuple[Tensor, Tensor]]
    shape: tuple[int, ...]
    largest: Tensor
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, grad: Tensor, n: int, *, in_brief: bool = False, first: Sketch | None = None) -> Sketch:
        """The sketch of a gradient, on its device.

        Args:
            grad: the gradient.
            n: the number of samples, which decides which axes may count them; the first axis always may, by a list of samples.
            in_brief: whether only the likeliest axes, those with n indices, are sketched whole. Along each other axis, one slice
                is sketched, which nearly always shows that the axis counts no samples.
            first: the sketch of the gradient in the first pass, if this is a later pass; the same slices are sketched.
        """
        value, shape = grad, tuple(grad.shape)
        if value.is_complex():  # Real marks multiply both parts.
            value = torch.view_as_real(value.resolve_conj())
        possible = [axis for axis, size in enumerate(shape) if size % n == 0 or not axis]
        whole = possible
        if in_brief and n > 1 and shape and value.numel():
            whole = [axis for axis in possible if shape[axis] == n or shape[axis] > EXACT] or [0]
        others = [axis for axis in possible if axis not in whole and shape[axis] % n == 0]
        with full_precision():
            axes = {axis: _contracted(value, axis) for axis in whole}
            if not others:
                return cls(axes, {}, shape, _largest(value), grad.dtype.to_real(), grad.device)
            if first is not None:
                largest, indices = _largest(value), {axis: first.slices[axis][0] for axis in others}
            else:
                largest, place = _peak(value)
                indices = {axis: _index_along(value, axis, place) for axis in others}
            slices = {
                axis: (at, _after(value.index_select(axis, at).reshape(1, -1))[:, 0]) for axis, at in indices.items()
            }
        return cls(axes, slices, shape, largest, grad.dtype.to_real(), grad.device)

    @property
    def tiny(self) -> float:
        """The smallest normal number of the gradient's dtype."""
        return torch.finfo(self.dtype).tiny

    def _tensors(self) -> Iterator[Tensor]:
        yield self.largest
        yield from self.axes.values()
        for pair in self.slices.values():
            yield from pair

    def _with(self, tensors: Iterator[Tensor]) -> Sketch:
        """The same sketch with other tensors, in the order of :meth:`_tensors`."""
        largest = next(tensors)
        axes = {axis: next(tensors) for axis in self.axes}
        slices = {axis: (next(tensors), next(tensors)) for axis in self.slices}
        return Sketch(axes, slices, self.shape, largest, self.dtype, self.device)


Sketches = list[Sketch | None]


def read_together(passes: Sequence[Sketches]) -> list[Sketches]:
    """The sketches of all passes of a search in float64 on the host, which waits for each device once."""
    there = [sketch for sketches in passes for sketch in sketches if sketch is not None]
    values = iter(together_on_host([x for sketch in there for x in sketch._tensors()]))
    return [[None if sketch is None else sketch._with(values) for sketch in sketches] for sketches in passes]


def _largest(value: Tensor) -> Tensor:
    """The largest magnitude of a tensor."""
    if not value.numel():
        return value.new_zeros(())
    least, most = value.aminmax()
    return torch.maximum(most, -least)


def _peak(value: Tensor) -> tuple[Tensor, Tensor]:
    """The largest magnitude of a tensor, and the place of such an entry in the flattened tensor, ``[1]``."""
    if value.numel() <= SMALL:
        largest, place = value.reshape(-1).abs().max(0, keepdim=True)
        return largest[0], place
    width = 1
    for size in reversed(value.shape):
        if width >= ROW:
            break
        width *= size
    rows = value.reshape(-1, width)
    peaks = torch.maximum(rows.amax(1), -rows.amin(1))
    row = peaks.argmax(0, keepdim=True)
    entries = rows.index_select(0, row)[0].abs()
    return peaks.max(), row * width + entries.argmax(0, keepdim=True)


def _index_along(value: Tensor, axis: int, place: Tensor) -> Tensor:
    """The index along an axis of the entry at a place in the flattened tensor."""
    after = math.prod(value.shape[axis + 1 :])
    return place.div(after, rounding_mode="floor") % value.shape[axis]


def _contracted(value: Tensor, axis: int) -> Tensor:
    """The products of each slice along an axis with random directions, ``[size, DIRECTIONS]``, in float32 at least.

    A slice's direction is the product of one for the axes before the given one and one for those after it.
    """
    before, size, after = math.prod(value.shape[:axis]), value.shape[axis], math.prod(value.shape[axis + 1 :])
    # The longer side is contracted first, since little is left after that.
    if before < after:
        rows = _after(value.reshape(before * size, after)).view(DIRECTIONS, before, size)
        return rows[:, 0].mT if before == 1 else torch.einsum("dbs,db->sd", rows, _directions(before, rows))
    columns = _before(value.reshape(before, size * after)).view(DIRECTIONS, size, after)
    return columns[..., 0].mT if after == 1 else torch.einsum("dsa,da->sd", columns, _directions(after, columns))


def _after(value: Tensor) -> Tensor:
    """``[rows, columns]`` -> ``[DIRECTIONS, rows]``, by directions for the columns.

    With the few directions on the left, the product takes a third of the time that it takes with them on the right.
    """
    rows, columns = value.shape
    if columns <= LONG:
        return _times(_directions(columns, value), value)
    whole = columns // LONG
    parts = _times(_directions(LONG, value), value[:, : whole * LONG].reshape(rows * whole, LONG))
    along = torch.einsum("drp,dp->dr", parts.view(DIRECTIONS, rows, whole), _directions(whole, parts))
    return along + _after(value[:, whole * LONG :]) if columns % LONG else along


def _times(directions: Tensor, value: Tensor) -> Tensor:
    """The products with each row; half precision is widened part by part."""
    if not is_half(value):
        return directions @ value.mT
    rows = max(1, WIDENED // value.shape[1]) if value.shape[1] else 1
    found = [directions @ part.float().mT for part in value.split(rows)]
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def _before(value: Tensor) -> Tensor:
    """``[rows, columns]`` -> ``[DIRECTIONS, columns]``, by directions for the rows."""
    long = max(1, min(LONG, WIDENED // value.shape[1])) if is_half(value) and value.shape[1] else LONG
    if (rows := value.shape[0]) <= long:
        return _directions(rows, value) @ _widened(value)
    left, outer = _directions(long, value), _directions(-(-rows // long), value)
    parts = zip(value.split(long), outer.unbind(1), strict=True)
    products = ((left[:, : len(part)] * factor[:, None]) @ _widened(part) for part, factor in parts)
    return sum(products, outer.new_zeros(()))


def _widened(value: Tensor) -> Tensor:
    return value.float() if is_half(value) else value


def _directions(size: int, like: Tensor) -> Tensor:
    """Random directions, ``[DIRECTIONS, size]``, in the dtype in which a tensor is summed."""
    return _directions_on(size, torch.float32 if is_half(like) else like.dtype, like.device)


@lru_cache(64)  # each copy to an accelerator makes the host wait
def _directions_on(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(DIRECTIONS, size, generator=generator, dtype=torch.float32, device="cpu").to(device, dtype)
