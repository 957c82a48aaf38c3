"""Labels through nodes that take parts of a tensor, and through those that put parts together."""

from __future__ import annotations

import numpy as np

from torch_secorder.autograd.saved import saved
from torch_secorder.batch_axis.label_rules.registry import Answer, At, backward, rule
from torch_secorder.batch_axis.labels import NOBODY, differ, put


@rule("SelectBackward0", reads=("axis", "index"))
def _select(at: At) -> Answer | None:
    if not (shape := at.inputs[0]):
        return None
    axis = at.axis(shape)
    index = np.array([saved(at.node, "index") % shape[axis]])
    return [put(np.expand_dims(at.first, axis), axis, index, shape[axis])]


@rule("SliceBackward0", reads=("axis", "start", "stop", "step"))
def _slice(at: At) -> Answer | None:
    if not (shape := at.inputs[0]):
        return None
    axis = at.axis(shape)
    part = slice(*(saved(at.node, name) for name in ("start", "stop", "step")))
    return [put(at.first, axis, part, shape[axis])]


@rule(*backward("Split SplitWithSizes UnsafeSplit Unbind", [0]), reads=("axis",), needs_first=False)
def _parts(at: At) -> Answer | None:
    """A tensor that was split along an axis: the labels of its parts side by side, NOBODY for parts without a gradient."""
    if not (shape := at.inputs[0]):
        return None
    axis, unbound = at.axis(shape), at.node.name() == "UnbindBackward0"
    there = [one if one is None or not unbound else np.expand_dims(one, axis) for one in at.labels]
    given = [one for one in there if one is not None]
    alike = all(np.array_equal(one, given[0]) for one in given[1:])
    if alike and given[0].shape[axis] == 1 and differ(given[0]):
        return [given[0]]
    sizes = [1 if unbound else whole[axis] for whole in at.shapes]
    others = np.broadcast_shapes(*[(*one.shape[:axis], 1, *one.shape[axis + 1 :]) for one in given])
    blocks = []
    for one, size in zip(there, sizes, strict=True):
        part = np.full((1,) * len(shape), NOBODY) if one is None else one
        blocks.append(np.broadcast_to(part, (*others[:axis], size, *others[axis + 1 :])))
    return [np.concatenate(blocks, axis)]


@rule("CatBackward0", reads=("axis",))
def _cat(at: At) -> Answer | None:
    whole = at.shapes[0]
    axis = at.axis(whole)
    if at.first.shape[axis] == 1:
        return [at.first] * len(at.inputs)
    if any(shape is not None and len(shape) != len(whole) for shape in at.inputs) or at.inputs.count(None) > 1:
        return None
    sizes = [None if shape is None else shape[axis] for shape in at.inputs]
    left = whole[axis] - sum(size for size in sizes if size is not None)
    ends = np.cumsum([left if size is None else size for size in sizes])
    if ends[-1] != whole[axis]:
        return None
    return np.split(at.first, ends[:-1], axis)


@rule("StackBackward0", reads=("axis",))
def _stack(at: At) -> Answer:
    axis = at.axis(at.shapes[0])
    if at.first.shape[axis] == 1:
        return [at.first.squeeze(axis)] * len(at.inputs)
    return [at.first.take([index], axis).squeeze(axis) for index in range(len(at.inputs))]
