"""Rows of a table that the data chooses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_secorder.autograd.saved import saved
from torch_secorder.errors import CoupledSamplesError
from torch_secorder.per_sample import PerSampleGradient, PulledBack, RowSparse
from torch_secorder.rules.node_rules import NodeUse, node_rule


@node_rule(
    "EmbeddingBackward0",
    lambda at: at.placement.axis < saved(at.node, "ids").dim(),
    reads=("ids", "padding_id", "by_frequency"),
)
def embedding(at: NodeUse, g: Tensor) -> PerSampleGradient:
    """Rows of a table."""
    ids, padding = saved(at.node, "ids"), saved(at.node, "padding_id")
    if saved(at.node, "by_frequency"):
        raise CoupledSamplesError("an embedding with scale_grad_by_freq=True divides by frequencies in the whole batch")
    if 0 <= padding < at.shape[0]:
        g = g.masked_fill((ids == padding)[..., None], 0)
    ids, g = at.rows(ids), at.rows(g)
    ids = ids.reshape(len(ids), -1)
    return RowSparse(ids, g.reshape(*ids.shape, g.shape[-1]), at.shape)


_MASKS = (torch.bool, torch.uint8)


@dataclass(frozen=True)
class _Lookup:
    """Which entries of a value an indexing reads, along some neighboring axes.

    Attributes:
        first: the first of these axes.
        axes: the number of these axes.
        ids: for each entry that is read, its number along these axes taken together.
    """

    first: int
    axes: int
    ids: Tensor


def _lookup(at: NodeUse) -> _Lookup | None:
    """What an indexing by integers along neighboring axes reads; None for any other indexing."""
    if at.node.name() == "IndexSelectBackward0":
        ids: Tensor = saved(at.node, "index")
        return _Lookup(saved(at.node, "axis") % len(at.shape), 1, ids) if ids.dim() == 1 else None
    indices = list(saved(at.node, "indices"))
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    if axes != list(range(axes[0], axes[-1] + 1)) or any(indices[axis].dtype in _MASKS for axis in axes):
        return None
    ids = torch.zeros((), dtype=torch.long, device=indices[axes[0]].device)
    for axis in axes:
        ids = ids * at.shape[axis] + indices[axis].long() % at.shape[axis]
    return _Lookup(axes[0], len(axes), ids)


def _by_samples(at: NodeUse) -> bool:
    """Whether each sample reads entries of its own."""
    lookup = _lookup(at)
    return lookup is not None and 0 <= at.placement.axis - lookup.first < lookup.ids.dim()


@node_rule("IndexSelectBackward0", _by_samples, reads=("axis", "index"))
@node_rule("IndexBackward0", _by_samples, reads=("indices",))
def index(at: NodeUse, g: Tensor) -> PerSampleGradient:
    """Entries of a value by their numbers: ``table[ids]``, ``table[:, rows, columns]``."""
    lookup = _lookup(at)
    assert lookup is not None
    first, last = lookup.first, lookup.first + lookup.axes
    before, read, after = at.shape[:first], at.shape[first:last], at.shape[last:]
    ids = lookup.ids.movedim(at.placement.axis - first, 0)
    g = at.rows(g).movedim(tuple(range(1, first + 1)), tuple(range(ids.dim(), ids.dim() + first)))
    ids = ids.reshape(len(ids), -1)
    width = math.prod(before) * math.prod(after)
    rows = RowSparse(ids, g.reshape(*ids.shape, width), (math.prod(read), width))
    if rows.shape == at.shape:
        return rows

    def moved(value: Tensor) -> Tensor:
        value = value.reshape(len(value), *read, *before, *after)
        axes = range(1 + len(read), 1 + len(read) + first)
        return value.movedim(tuple(axes), tuple(range(1, first + 1)))

    return PulledBack(rows, moved, at.shape, ("entries", first, lookup.axes))
