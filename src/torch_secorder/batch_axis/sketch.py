"""What is kept of a gradient while a look is under way: its products with a few random directions.

The gradients of a whole model would not fit into memory. What is kept stays on the device until the look is over, and all of it
goes to the host in one copy: on the way nothing waits for the device.
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

# Along a single random direction, what samples share may scale as if it were one sample's by accident, in half precision above
# all; along several it does not.
DIRECTIONS = 8

# Directions for a longer side are products of shorter ones. Made in full, they would take as much memory as a gradient.
LONG = 2**12

# As many numbers of half precision are widened at once. Widened in full, logits would take more memory than a step does.
WIDENED = 2**24

# In tensors of more than so many entries, the largest one is looked for in rows of at least this length: first the row, then the
# entry. In small ones that would be more calls.
SMALL, ROW = 2**16, 512

# Whole numbers up to this one are exact in single precision, in which indices travel to the host.
EXACT = 2**24


@dataclass(frozen=True)
class Sketch:
    """What is kept of a gradient: for every slice along every axis, its products with a few random directions.

    A power of two that multiplies a slice multiplies its products too, without rounding, and a slice of zeros has products of
    zero, so that they show the same.

    Attributes:
        axes: for each axis that may count samples the products of its slices, ``[size, DIRECTIONS]``.
        slices: for each axis of which one slice is looked at only, the slice's index, ``[1]``, and its products.
        shape: the gradient's shape.
        largest: the largest magnitude in the gradient, one number.
        dtype: the gradient's, or that of its real and imaginary parts.
        device: the gradient's.
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
            n: the number of samples, which decides what axes may count them; the first may always, by a list.
            in_brief: look at the whole of the likeliest axes only, which are those with n indices, and at one slice along each
                other one, which nearly always shows that it belongs to no single sample.
            first: the sketch of the gradient in the first pass, if this is another one; the same slices are looked at.
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
        """The same with other tensors, in the order of :meth:`_tensors`."""
        largest = next(tensors)
        axes = {axis: next(tensors) for axis in self.axes}
        slices = {axis: (next(tensors), next(tensors)) for axis in self.slices}
        return Sketch(axes, slices, self.shape, largest, self.dtype, self.device)


Sketches = list[Sketch | None]


def read_together(passes: Sequence[Sketches]) -> list[Sketches]:
    """The sketches of all passes of a look in float64 on the host, which waits for each device once."""
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
    """The index along an axis of the entry at a place of the flattened tensor. Slices through the largest are not zero."""
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
    """A product with each row, for which half precision is widened bit by bit."""
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


@lru_cache(64)  # on an accelerator, each copy there makes the host wait
def _directions_on(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(DIRECTIONS, size, generator=generator, dtype=torch.float32, device="cpu").to(device, dtype)
