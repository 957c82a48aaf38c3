"""A sample's own outputs, put in the place of its rows in the batch's outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torch_secorder.batch_axis.placement import Placement
from torch_secorder.batch_axis.samples import BatchSamples
from torch_secorder.errors import VerificationError
from torch_secorder.model.containers import parts, tensors, with_parts
from torch_secorder.model.nested import with_rows


def with_own_rows(where: BatchSamples, sample: int, own: Any, batch: Any) -> Any:
    """A batch's outputs with one sample's own outputs in its rows. An output without rows is the sample's if the shapes agree.

    Parts are matched by their names, since fields may have been set in another order.

    Args:
        where: where the batch's outputs have their samples.
        sample: the sample's number in the batch.
        own: the outputs for the sample alone.
        batch: the outputs for the batch, of the same structure except for lists with an item for each sample.

    Raises:
        VerificationError: if the two have different parts.
    """
    axes = where.words.axes("outputs")
    if not isinstance(axes, Mapping) or isinstance(batch, Tensor):
        return _merged(where, sample, where.words.axis("outputs", 0), own, batch)
    mine = dict(parts(own))
    if mine.keys() != dict(parts(batch)).keys():
        raise _differ(own, batch)
    return with_parts(
        lambda key, part: _merged(where, sample, where.words.axis("outputs", key), mine[key], part), batch
    )


def _merged(where: BatchSamples, sample: int, axis: Any, own: Any, batch: Any) -> Any:
    if isinstance(batch, Tensor):
        if not isinstance(own, Tensor):
            raise _differ(own, batch)
        return _with_own_row(where.anywhere(batch, axis), sample, own, batch)
    inner = parts(batch)
    mine = dict(parts(own))
    if isinstance(batch, (list, tuple)) and len(batch) == where.n and len(mine) == 1 < where.n:
        return type(batch)(own[0] if place == sample else item for place, item in enumerate(batch))
    if inner and mine.keys() != dict(inner).keys():
        raise _differ(own, batch)
    return with_parts(lambda key, part: _merged(where, sample, axis, mine[key], part), batch)


def _differ(own: Any, batch: Any) -> VerificationError:
    return VerificationError(
        f"the model returns {len(tensors(batch))} tensors for a batch and {len(tensors(own))} for one of its samples alone, or "
        "under other names, so that the two can't be compared; verify=False returns the numbers unchecked"
    )


def _with_own_row(placement: Placement | None, sample: int, own: Tensor, batch: Tensor) -> Tensor:
    """One of the batch's outputs with the sample's own in its rows; without rows, the sample's if the shapes agree."""
    if placement is None:
        return own if own.shape == batch.shape else batch
    if batch.is_nested:
        return with_rows(batch, {sample: own.unbind()[0]})
    axis = placement.axis
    if placement.sample_index is not None:
        places = (placement.sample_index == sample).nonzero().flatten()
        return batch.index_copy(axis, places, own) if own.shape[axis : axis + 1] == places.shape else batch
    row = batch.narrow(axis, sample, 1)
    # A model that squeezes its outputs drops the axis of a single sample.
    if [side for side in own.shape if side != 1] != [side for side in row.shape if side != 1]:
        return own if own.shape == batch.shape else batch
    others = batch.narrow(axis, 0, sample), batch.narrow(axis, sample + 1, batch.shape[axis] - sample - 1)
    return torch.cat([others[0], own.reshape(row.shape), others[1]], axis)
