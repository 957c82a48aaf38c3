"""Labels through nodes that only move entries: views, transposes, repetitions."""

from __future__ import annotations

import math

import numpy as np

from torch_secorder.autograd.saved import saved
from torch_secorder.batch_axis.label_rules.registry import Answer, At, backward, rule
from torch_secorder.batch_axis.labels import joined_along, reshaped


@rule(*backward("View UnsafeView ReshapeAlias Squeeze Unsqueeze"))
def _views(at: At) -> Answer | None:
    shape = at.inputs[0]
    if shape is None or math.prod(shape) != math.prod(at.shapes[0]):
        return None
    return [reshaped(at.first, at.shapes[0], shape)]


@rule("ViewAsComplexBackward0")
def _view_as_complex(at: At) -> Answer:
    return [np.expand_dims(at.first, -1)]


@rule("ViewAsRealBackward0")
def _view_as_real(at: At) -> Answer:
    return [joined_along(at.first, [at.first.ndim - 1]).squeeze(-1)]


@rule("TBackward0", "TBackward1")
def _t(at: At) -> Answer:
    return [at.first.T]


@rule("TransposeBackward0", "TransposeBackward1", reads=("axis", "other"))
def _transpose(at: At) -> Answer | None:
    if not at.shapes[0]:
        return None
    return [np.swapaxes(at.first, at.axis(at.shapes[0]), saved(at.node, "other") % len(at.shapes[0]))]


@rule("PermuteBackward0", reads=("axes",))
def _permute(at: At) -> Answer:
    axes = [axis % len(at.shapes[0]) for axis in saved(at.node, "axes")]
    return [at.first.transpose(np.argsort(axes))]


@rule("RepeatBackward0", reads=("times",))
def _repeat(at: At) -> Answer | None:
    if at.inputs[0] is None:
        return None
    times, found = saved(at.node, "times"), at.first
    for axis, (count, size) in enumerate(zip(times, at.shapes[0], strict=True)):
        if count > 1 and found.shape[axis] > 1:
            split = found.reshape((*found.shape[:axis], count, size // count, *found.shape[axis + 1 :]))
            found = joined_along(split, [axis]).reshape((*found.shape[:axis], size // count, *found.shape[axis + 1 :]))
    return [found]


@rule("RollBackward0", reads=("axes", "shifts"))
def _roll(at: At) -> Answer | None:
    if not saved(at.node, "axes"):
        return None
    found = at.first
    for axis, shift in zip(saved(at.node, "axes"), saved(at.node, "shifts"), strict=True):
        found = np.roll(found, -shift, axis)
    return [found]


@rule("FlipBackward0", reads=("axes",))
def _flip(at: At) -> Answer:
    return [np.flip(at.first, tuple(saved(at.node, "axes")))]
