"""Labels: the sample that each entry of a gradient comes from, derived from the nodes of a graph without computing gradients.

An entry is labeled with sample n if it is computed only from gradients of sample n's outputs. Labels are arrays with the axes of
the tensor that they describe, of size 1 along axes that make no difference. Labels are conservative: an entry may be labeled with
several samples by mistake, but an entry that is labeled with one sample always belongs to that sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int64]
Shape = Sequence[int]

NOBODY = -1  # the entry is zero, whatever the outputs' gradients are
SEVERAL = -2  # the entry may be computed from several samples
_LARGE = np.iinfo(np.int64).max


def joined(one: Labels | None, other: Labels | None) -> Labels | None:
    """The labels of a sum of two gradients; None stands for a gradient that does not arrive."""
    if one is None or other is None or one is other:
        return other if one is None else one
    if one.shape == other.shape and np.array_equal(one, other):
        return one
    return np.where(one == other, one, np.where(one == NOBODY, other, np.where(other == NOBODY, one, SEVERAL)))


def joined_along(labels: Labels, axes: Sequence[int]) -> Labels:
    """The labels of entries that are computed from all entries along some axes; these axes get the size 1."""
    own = labels.shape
    axes = tuple([axis for axis in axes if own[axis] != 1])
    if not axes:
        return labels
    lowest = np.where(labels == NOBODY, _LARGE, labels).min(axes, keepdims=True, initial=_LARGE)
    highest = labels.max(axes, keepdims=True, initial=NOBODY)
    return _combined(lowest, highest)


def _combined(lowest: Labels, highest: Labels) -> Labels:
    """The label of entries with these lowest and highest labels; NOBODY does not count for the lowest."""
    return np.where(lowest == highest, highest, np.where(lowest == _LARGE, NOBODY, SEVERAL))


def of_all(labels: Sequence[Labels | None], dims: int) -> Labels | None:
    """The label of entries that are computed from all of several gradients, for a tensor with ``dims`` axes."""
    found = None
    for one in labels:
        if one is not None:
            whole = joined_along(one, range(one.ndim)).reshape((1,) * dims)
            found = whole if found is None else joined(found, whole)
    return found


def summed_to(labels: Labels, shape: Shape) -> Labels:
    """The labels of a gradient after it is summed to the shape that had been broadcast."""
    if more := labels.ndim - len(shape):
        labels = joined_along(labels, range(more)).reshape(labels.shape[more:])
    return joined_along(labels, [axis for axis, size in enumerate(shape) if size == 1])


def fits(labels: Labels, shape: Shape) -> bool:
    """Whether labels may be those of a tensor of this shape."""
    return _may_be(labels.shape, tuple(shape))


@lru_cache(4096)  # A steady step behind a router asks for each node.
def _may_be(labels: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(labels) == len(shape) and all(a in (1, b) for a, b in zip(labels, shape, strict=True))


def reshaped(labels: Labels, old: Shape, new: Shape) -> Labels:
    """The labels of a tensor after it is reshaped, with its entries in the same order."""
    if 0 in old:
        return np.full((1,) * len(new), NOBODY)
    whole, shape = _reshaping(labels.shape, tuple(old), tuple(new))
    return (labels if whole == labels.shape else np.broadcast_to(labels, whole)).reshape(shape)


@lru_cache(1024)
def _reshaping(labels: tuple[int, ...], old: tuple[int, ...], new: tuple[int, ...]) -> tuple[Any, Any]:
    """The shape to broadcast labels to, and the shape to give them then; axes that make no difference keep the size 1."""
    whole, shape, i, j = list(labels), [1] * len(new), 0, 0
    while i < len(old) or j < len(new):
        # The next axes with the same number of entries before and after.
        start, begin = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while (before := math.prod(old[start:i])) != (after := math.prod(new[begin:j])):
            i, j = (i + 1, j) if before < after else (i, j + 1)
        if any(size != 1 for size in labels[start:i]):
            whole[start:i] = old[start:i]
            shape[begin:j] = new[begin:j]
    return tuple(whole), tuple(shape)


def differ(labels: Labels) -> bool:
    """Whether the labels differ from each other, without those of nobody."""
    return labels.size > 1 and bool((labels != labels.flat[0]).any()) and _all_together(labels) == SEVERAL


def on_axis(labels: Labels, axis: int, dims: int) -> Labels:
    """The labels of the indices along one axis, for a tensor with ``dims`` axes."""
    return labels.reshape([-1 if other == axis else 1 for other in range(dims)])


def differ_along(labels: Labels, axes: Sequence[int]) -> bool:
    """Whether several samples are told apart along some axes, taken together as if they were one."""
    return bool((joined_along(_alone(labels), axes) == SEVERAL).any())


def samples_in(labels: Labels) -> int:
    """How many samples are told apart: none, one, or two for several of them."""
    return {NOBODY: 0, SEVERAL: 2}.get(_all_together(_alone(labels)), 1)


def _all_together(labels: Labels) -> int:
    """The label of what is computed from all entries."""
    return int(joined_along(labels, range(labels.ndim)).item())


def _alone(labels: Labels) -> Labels:
    """The labels without those of entries that several samples share."""
    return np.where(labels == SEVERAL, NOBODY, labels)


def put(labels: Labels, axis: int, index: Any, size: int) -> Labels:
    """The labels of a tensor of which only some indices along an axis were used; the others get no gradient.

    Args:
        labels: the labels of the used part, with its indices along ``axis``.
        axis: the axis.
        index: the used indices: a slice, or an array of different indices.
        size: the number of indices along the axis.
    """
    if labels.shape[axis] == 1 and differ(labels):
        return labels  # The samples are along another axis. Entries without a gradient may have any label.
    found = np.full((*labels.shape[:axis], size, *labels.shape[axis + 1 :]), NOBODY)
    found[(slice(None),) * axis + (index,)] = labels
    return found


def scattered(labels: Labels, axis: int, index: npt.NDArray[np.int64], sizes: Shape) -> Labels:
    """The labels of a tensor that was indexed, so that each entry went to several places, to one, or to none.

    Args:
        labels: the labels of the indexing's result, with the axes of the index in place of the indexed axes.
        axis: the first of these axes.
        index: for each place in the result, the number of the entry that is there, counted along all indexed axes together.
        sizes: the sizes of the indexed axes.
    """
    before, own, after = labels.shape[:axis], labels.shape[axis : axis + index.ndim], labels.shape[axis + index.ndim :]
    if set(own) <= {1} and differ(labels):
        return labels.reshape((*before, *[1] * len(sizes), *after))
    places = np.broadcast_to(labels, (*before, *index.shape, *after))
    places = np.moveaxis(places.reshape((*before, index.size, *after)), len(before), 0)
    shape = (math.prod(sizes), *places.shape[1:])
    lowest, highest = np.full(shape, _LARGE), np.full(shape, NOBODY)
    np.minimum.at(lowest, index.ravel(), np.where(places == NOBODY, _LARGE, places))
    np.maximum.at(highest, index.ravel(), places)
    found = np.moveaxis(_combined(lowest, highest), 0, len(before))
    return found.reshape((*before, *sizes, *after))


def scattered_along(labels: Labels, axis: int, index: npt.NDArray[np.int64], size: int) -> Labels:
    """The same for an index that gives each entry's own place along one axis of ``size`` indices, as in ``gather``."""
    shape = np.broadcast_shapes(labels.shape, index.shape)
    whole = (*shape[:axis], size, *shape[axis + 1 :])
    lowest, highest = np.full(whole, _LARGE), np.full(whole, NOBODY)
    places: list[Any] = list(np.ogrid[tuple([slice(other) for other in shape])])
    places[axis] = np.broadcast_to(index, shape)
    np.minimum.at(lowest, tuple(places), np.broadcast_to(np.where(labels == NOBODY, _LARGE, labels), shape))
    np.maximum.at(highest, tuple(places), np.broadcast_to(labels, shape))
    return _combined(lowest, highest)
