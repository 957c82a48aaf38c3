"""Nodes that put entries where an index or a setting of theirs says, and whether they put samples there.

Two graphs whose nodes have the same kinds and shapes may still differ in what such nodes have saved. Where an index only picks
features or positions, and every sample is treated alike, that is of no importance for where the samples are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import Node

from torch_secorder.autograd.kept_values import numbers_of_function
from torch_secorder.autograd.saved import knows, saved
from torch_secorder.batch_axis.label_rules import COPY_SLICES, MASKED_SCATTER, PYTHON_FUNCTION, At, labels_of_inputs
from torch_secorder.batch_axis.label_rules.layers import pads
from torch_secorder.batch_axis.label_rules.written import axis_of_samples, is_known_view, takes_some
from torch_secorder.batch_axis.labels import Labels, differ_along, joined_along, samples_in

# All kinds with a rule that reads where entries go. Of a kind without a rule labels tell nothing.
_NAMES = (
    "Cat ConstantPadNd Flip Gather Index IndexAdd IndexCopy IndexPut IndexSelect Roll Scatter ScatterAdd Select Slice Sort Split "
    "SplitWithSizes Stack Topk Unbind UnsafeSplit"
)
MOVES = frozenset(
    [
        *(f"{name}Backward0" for name in _NAMES.split()),
        "AsStridedBackward0",
        "AsStridedBackward1",
        COPY_SLICES,
        MASKED_SCATTER,
    ]
)


@dataclass(frozen=True)
class Mover:
    """A node that puts samples where what it has saved says.

    Attributes:
        node: the node.
        places: of a node with several indices those that decide it, of a write into a part the axis with the samples, or nothing
            where all that it does decides it; of a mask 0 if it decides by how many entries each index along the first axis
            gets; None for all that a node has saved.
    """

    node: Node
    places: tuple[int, ...] | None = None


def mover(at: At, n: int) -> Mover | None:
    """What a node moves of n samples, if it does: samples lie along an axis that it works along.

    All that arrives may also belong to one sample. Then the node may be one of several that take samples apart.

    Args:
        at: the node, and the labels of its outputs' gradients.
        n: how many samples.
    """
    if at.kind == PYTHON_FUNCTION:
        return Mover(at.node) if numbers_of_function(at.node, n) or any(map(_turns, at.indices)) else None
    if at.kind not in MOVES or _takes_all(at):
        return None
    counts = [samples_in(labels) for labels in at.labels if labels is not None]
    if max(counts) < 2:
        return Mover(at.node) if max(counts) else None
    if at.kind in ("IndexBackward0", "IndexPutBackward0") and at.indices:
        labels = labels_of_inputs(at, [0])[0] if at.kind == "IndexBackward0" else at.first
        return None if labels is None else _by_indices(at, labels)
    if at.kind == COPY_SLICES:
        return _by_writing(at)
    if at.kind == "AsStridedBackward1" and _is_of_pooling(at):
        return None
    if at.kind == MASKED_SCATTER:
        # An entry that belongs to nobody in this graph may be put by another mask.
        by_rows = axis_of_samples(at.first) == 0 and at.first == joined_along(at.first, range(1, at.first.ndim))
        return Mover(at.node, (0,) if np.all(by_rows) else None)
    along = list(_axes(at))
    moves = any(differ_along(labels, along) for labels in at.labels if labels is not None)
    return Mover(at.node) if moves else None


def _takes_all(at: At) -> bool:
    """Whether a slice has all of what it is taken from, as torch up to 2.8 makes of a colon in an index."""
    return at.kind == "SliceBackward0" and at.inputs[0] == at.shapes[0]


def _is_of_pooling(at: At) -> bool:
    """Whether a view is the one that torch makes of pooled images whose channels lie innermost, where it moves nothing."""
    shape, made_by = at.shapes[0], at.node.next_functions[0][0]
    if len(shape) != 4 or at.inputs[0] != shape or made_by is None or made_by.name() != "MeanBackward1":
        return False
    channels = shape[1]
    return shape[2:] == (1, 1) and tuple(saved(at.node, "stride")) == (channels, 1, channels, channels)


def _by_writing(at: At) -> Mover | None:
    """What a write into a part moves. An index may stand behind it, which nothing shows, so that each one is asked."""
    if all(shape is None for shape in at.inputs[1:]):
        return None  # Numbers were written, which belong to nobody.
    axis = axis_of_samples(at.first) if at.indices else None
    if is_known_view(at, axis):
        return Mover(at.node, ())
    return Mover(at.node, None if axis is None or takes_some(at, axis) else (axis,))


def _turns(origins: Tensor | None) -> bool:
    """Whether some row of a function's input comes from another row of its output."""
    if origins is None or len(origins) < 2:
        return False
    return bool(((origins >= 0) & (origins != torch.arange(len(origins), device="cpu"))).any())


def _by_indices(at: At, labels: Labels) -> Mover | None:
    """What indices move, by the labels of what is indexed.

    If the samples are taken in turn along one axis, it is of no importance which index each has along others.
    """
    axes = _indexed(at.indices)
    if not differ_along(labels, [axis for several in axes.values() for axis in several]):
        return None
    for place, own in axes.items():
        others = [axis for other, several in axes.items() if other != place for axis in several]
        if len(own) == 1 and _is_in_turn(at.indices[place], labels.shape[own[0]]) and not differ_along(labels, others):
            return Mover(at.node, (place,))
    return Mover(at.node, tuple(axes))


def _is_in_turn(index: Tensor | None, size: int) -> bool:
    if index is None or index.dtype in (torch.bool, torch.uint8) or index.numel() != size:
        return False
    return bool((index.reshape(-1) == torch.arange(size, device="cpu")).all())


def _axes(at: At) -> Iterable[int]:
    """The axes of a node's output that it works along."""
    kind, shape = at.kind, at.shapes[0]
    if kind in ("SelectBackward0", "UnbindBackward0"):
        return ()
    if kind == "ConstantPadNdBackward0" and knows(kind, "pads"):
        return pads(at)
    if kind in ("FlipBackward0", "RollBackward0") and knows(kind, "axes"):
        return at.axes(shape)
    return [at.axis(shape)] if shape and knows(kind, "axis") else range(len(shape))


def _indexed(indices: Sequence[Tensor | None]) -> dict[int, list[int]]:
    """The places of some indices, and the axes that each of them goes along. A mask goes along as many as it has."""
    found, axis = {}, 0
    for place, index in enumerate(indices):
        count = index.dim() if index is not None and index.dtype in (torch.bool, torch.uint8) else 1
        if index is not None:
            found[place] = list(range(axis, axis + count))
        axis += count
    return found
