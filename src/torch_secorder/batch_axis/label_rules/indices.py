"""Labels through nodes that take rows by an index, or put rows where an index says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from torch_secorder.batch_axis.label_rules.registry import MASKED_SCATTER, Answer, At, Shape, backward, rule
from torch_secorder.batch_axis.labels import NOBODY, Labels, differ, scattered, scattered_along


def _entry_numbers(indices: Sequence[Tensor | None], shape: Shape) -> tuple[int, npt.NDArray[np.int64], Shape] | None:
    """The first axis that some indices go along, the numbers of the entries that they take, and the sizes of the indexed axes.

    The result is None unless these axes are neighbors. A mask goes along as many axes as it has.
    """
    arrays: list[Any] = []
    axes: list[int] = []
    place = 0
    for index in indices:
        if index is None:
            place += 1
            continue
        found = index.numpy()
        several = found.nonzero() if found.dtype in (np.bool_, np.uint8) else [found]
        arrays += several
        axes += range(place, place + len(several))
        place += len(several)
    if not axes or axes != list(range(axes[0], axes[-1] + 1)):
        return None
    sizes = tuple(shape[axis] for axis in axes)
    arrays = [array % max(size, 1) for array, size in zip(np.broadcast_arrays(*arrays), sizes, strict=True)]
    return axes[0], np.ravel_multi_index(arrays, sizes).astype(np.int64) if 0 not in sizes else arrays[0], sizes


@rule("IndexBackward0", reads=("indices",))
def _index(at: At) -> Answer | None:
    return _taken(at, at.indices)


@rule("IndexSelectBackward0", reads=("axis", "index"))
def _index_select(at: At) -> Answer | None:
    if not (shape := at.inputs[0]):
        return None
    (index,) = at.indices
    assert index is not None
    return _taken(at, [*[None] * at.axis(shape), index.reshape(-1)])


def _taken(at: At, indices: Sequence[Tensor | None]) -> Answer | None:
    shape = at.inputs[0]
    if not shape or 0 in shape or (entries := _entry_numbers(indices, shape)) is None:
        return None
    axis, numbers, sizes = entries
    if at.shapes[0] != (*shape[:axis], *numbers.shape, *shape[axis + len(sizes) :]):
        return None
    return [scattered(at.first, axis, numbers, sizes)]


@rule("IndexPutBackward0", reads=("indices",))
def _index_put(at: At) -> Answer | None:
    shape = at.shapes[0]
    if 0 in shape or (entries := _entry_numbers(at.indices, shape)) is None:
        return None
    axis, numbers, sizes = entries
    own = at.first.shape[axis : axis + len(sizes)]
    before, after = at.first.shape[:axis], at.first.shape[axis + len(sizes) :]
    if set(own) <= {1}:
        return [at.first, at.first.reshape((*before, *[1] * numbers.ndim, *after))]
    whole = np.broadcast_to(at.first, (*before, *sizes, *after)).reshape((*before, -1, *after))
    return [at.first, whole.take(numbers, axis)]


@rule(*backward("IndexAdd IndexCopy", [0]), reads=("axis", "index"))
def _added_rows(at: At) -> Answer | None:
    if not at.shapes[0]:
        return None
    if not at.indices:  # It keeps none for rows that need no gradient.
        return [at.first, None]
    axis = at.axis(at.shapes[0])
    if at.first.shape[axis] == 1:
        return [at.first, at.first]
    (index,) = at.indices
    assert index is not None
    return [at.first, at.first.take(index.numpy().reshape(-1), axis)]


@rule(*backward("Scatter ScatterAdd", [0]), reads=("axis", "index"))
def _scatter(at: At) -> Answer | None:
    if not at.shapes[0]:
        return None
    if not at.indices:  # It keeps none for rows that need no gradient.
        return [at.first, None]
    (index,), axis = at.indices, at.axis(at.shapes[0])
    assert index is not None
    own = at.first.shape
    if any(size not in (1, index.shape[other]) for other, size in enumerate(own) if other != axis):
        return [at.first, None]
    if own[axis] == 1:
        alike = all(
            size == whole
            for other, (size, whole) in enumerate(zip(index.shape, at.shapes[0], strict=True))
            if other != axis
        )
        return [at.first, at.first if alike else None]
    narrowed = _narrowed(index, at.first, axis).numpy()
    places: list[Any] = list(np.ogrid[tuple([slice(size) for size in narrowed.shape])])
    places = [np.zeros_like(place) if size == 1 else place for place, size in zip(places, own, strict=True)]
    places[axis] = narrowed
    return [at.first, at.first[tuple(places)]]


@rule(MASKED_SCATTER, reads=("index",))
def _masked_scatter(at: At) -> Answer | None:
    """Entries that were put in turn where a mask is true. Those that are left over get no gradient."""
    whole, source = at.shapes[0], at.inputs[1]
    if source is None or 0 in whole:
        return [at.first, None]
    (mask,) = at.indices
    assert mask is not None
    count = _rows_of_a_mask(mask.expand(whole), at.first, source)
    left, rows = len(whole) - count, source[: len(source) - count]
    put = mask.expand(whole).numpy()
    for _ in range(count):
        put = put[..., 0]
    labels = np.broadcast_to(at.first.reshape(at.first.shape[:left]), whole[:left])[put]
    found = np.full(math.prod(rows), NOBODY)
    found[: len(labels)] = labels[: len(found)]
    return [at.first, found.reshape(*rows, *[1] * count)]


def _rows_of_a_mask(mask: Tensor, labels: Labels, source: Shape) -> int:
    """Along how many of the last axes a mask and labels are the same, and what is put has the size of the whole."""
    alike = 0
    for axis in reversed(range(mask.dim())):
        repeats = mask.stride(axis) == 0 or mask.shape[axis] == 1
        if (
            not repeats
            or labels.shape[axis] != 1
            or source[len(source) - alike - 1 :][:1] != mask.shape[axis : axis + 1]
        ):
            break
        alike += 1
    return alike


@rule(*backward("Sort Topk Gather", [0]), reads=("axis", "index"))
def _picked_along_axis(at: At) -> Answer | None:
    if not (shape := at.inputs[0]):
        return None
    (index,), axis = at.indices, at.axis(shape)
    assert index is not None
    if at.first.shape[axis] == 1 and differ(at.first):
        return [at.first]  # with fewer indices along other axes it fits no input
    if any(index.shape[other] != size for other, size in enumerate(shape) if other != axis):
        return None
    return [scattered_along(at.first, axis, _narrowed(index, at.first, axis).numpy(), shape[axis])]


def _narrowed(index: Tensor, labels: Labels, axis: int) -> Tensor:
    """An index without its repetitions along axes that make no difference, as where whole rows are picked."""
    for other in range(index.dim()):
        if other != axis and index.stride(other) == 0 and labels.shape[other] == 1 and index.shape[other]:
            index = index.narrow(other, 0, 1)
    return index
