"""Labels through products of matrices, attention and whole layers."""

from __future__ import annotations

import math

import numpy as np

from torch_secorder.autograd.saved import saved
from torch_secorder.batch_axis.label_rules.registry import Answer, At, rule
from torch_secorder.batch_axis.labels import NOBODY, SEVERAL, joined_along


@rule("MmBackward0", "BmmBackward0", "AddmmBackward0", "BaddbmmBackward0")
def _product(at: At) -> Answer:
    """Products of matrices or of stacks of matrices, possibly added to another tensor."""
    rows = at.first.ndim - 2
    return [*[at.first] * (len(at.inputs) - 2), joined_along(at.first, [rows + 1]), joined_along(at.first, [rows])]


@rule("GroupedMmBackward0")
def _grouped_mm(at: At) -> Answer | None:
    """Groups of rows, each of which is multiplied by its own matrix."""
    left, right = at.inputs[:2]
    if len(at.shapes[0]) != 2 or (left is not None and len(left) != 2) or (right is not None and len(right) != 3):
        return None
    return [joined_along(at.first, [1]), None, *[None] * len(at.inputs[2:])]


@rule(
    "ScaledDotProductCudnnAttentionBackward0",
    "ScaledDotProductEfficientAttentionBackward0",
    "ScaledDotProductFlashAttentionBackward0",
    "ScaledDotProductFlashAttentionForCpuBackward0",
    "ScaledDotProductFusedAttentionOverrideableBackward0",
)
def _attention(at: At) -> Answer:
    """Attention, where the first axis of the output and that of query, key, value and bias count the same things."""
    return _first_axis(at, 4)


@rule("ConvolutionBackward0", "NativeGroupNormBackward0", reads=("groups",))
def _in_groups(at: At) -> Answer:
    """Images, of which each group of channels comes from a group of the input's: samples may be folded into the channels."""
    shape, groups = at.inputs[0], saved(at.node, "groups")
    if groups == 1 or at.first.ndim < 2 or at.first.shape[1] == 1 or shape is None or len(shape) != at.first.ndim:
        return _first_axis(at, 1)
    images = joined_along(at.first, range(2, at.first.ndim))
    of_groups = joined_along(images.reshape(len(images), groups, -1), [2])
    own = of_groups.repeat(shape[1] // groups, 2).reshape(len(images), shape[1], *[1] * (len(shape) - 2))
    return [own, *[None] * len(at.inputs[1:])]


def _first_axis(at: At, count: int) -> Answer:
    """For the first ``count`` inputs, each index along the first axis comes from the same index of the output."""
    found = joined_along(at.first, range(1, at.first.ndim))
    keep = [shape is not None and shape[:1] == at.shapes[0][:1] and len(shape) == found.ndim for shape in at.inputs]
    return [found if index < count and keep[index] else None for index in range(len(at.inputs))]


@rule("NativeLayerNormBackward0", "FusedRmsNormBackward0", reads=("shape",))
def _layer_norm(at: At) -> Answer:
    own = saved(at.node, "shape")
    found = joined_along(at.first, range(at.first.ndim - len(own), at.first.ndim))
    if at.kind == "NativeLayerNormBackward0" and math.prod(own) == 1:
        # A single entry is its own mean, so that nothing but rounding comes back, and no sample gets a part of another's.
        found = np.where(found == SEVERAL, NOBODY, found)
    return [found, *[None] * len(at.inputs[1:])]
