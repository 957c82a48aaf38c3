"""What nodes do with labels: for each kind of node, the labels of its inputs' gradients from those of its outputs' gradients.

A rule says from which entries of its outputs' gradients an entry of an input's gradient is computed. It may name too many
entries, but never too few. A kind without a rule is assumed to compute every entry from all entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.autograd.graph import Node

from torch_secorder.autograd.saved import knows, saved
from torch_secorder.batch_axis.labels import (
    NOBODY,
    Labels,
    differ,
    fits,
    joined_along,
    of_all,
    put,
    reshaped,
    scattered,
    scattered_along,
    summed_to,
)

Shape = tuple[int, ...]
Answer = Sequence[Labels | None]


@dataclass(frozen=True, eq=False)
class At:
    """A node that labels arrive at.

    Attributes:
        node: the node.
        labels: the labels of its outputs' gradients; None for a gradient that does not arrive.
        shapes: the shapes of its outputs.
        inputs: the shapes of its inputs; None for an input that needs no gradient.
        indices: the indices of :func:`indices_of`, on the host; None for an axis that is taken whole.
    """

    node: Any
    labels: Sequence[Labels | None]
    shapes: Sequence[Shape]
    inputs: Sequence[Shape | None]
    indices: Sequence[Tensor | None] = ()

    @property
    def first(self) -> Labels:
        """The labels of the first output's gradient, which has arrived."""
        assert self.labels[0] is not None
        return self.labels[0]

    def axis(self, shape: Sequence[int]) -> int:
        """The axis that the node works along, of a tensor of this shape."""
        axis: int = saved(self.node, "axis")
        return axis % len(shape)

    def axes(self, shape: Sequence[int]) -> list[int]:
        """The axes that the node works along; all axes if it names none."""
        return sorted({axis % len(shape) for axis in saved(self.node, "axes") or range(len(shape))})


Rule = Callable[[At], Answer | None]  # None where it does not apply
_RULES: dict[str, tuple[Rule, tuple[str, ...]]] = {}


def _rule(*kinds: str, reads: Sequence[str] = ()) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.update({kind: (rule, tuple(reads)) for kind in kinds})
        return rule

    return register


def _backward(names: str, versions: Sequence[int] = (0, 1, 2)) -> list[str]:
    return [f"{name}Backward{version}" for name in names.split() for version in versions]


def indices_of(node: Node) -> Sequence[Tensor | None] | None:
    """The indices that a node saved and that its rule reads; None if the rule reads none."""
    kind = node.name()
    _, reads = _RULES.get(kind, (None, ()))
    if "indices" in reads and knows(kind, "indices"):
        return tuple(saved(node, "indices"))
    if "index" in reads and knows(kind, "index"):
        found = saved(node, "index")
        return (found,) if isinstance(found, Tensor) else None
    return None


def reads_tensors(node: Node) -> bool:
    """Whether a node's rule may read tensors that it saved."""
    _, reads = _RULES.get(node.name(), (None, ()))
    return not {"index", "indices"}.isdisjoint(reads)


def labels_of_inputs(at: At) -> list[Labels | None]:
    """The labels of the gradients of a node's inputs; None for those that need none."""
    answer = _answer(at)
    found: list[Labels | None] = []
    for index, shape in enumerate(at.inputs):
        own = None if shape is None or answer is None else answer[index]
        if shape is not None and own is not None and own.ndim >= len(shape):
            own = summed_to(own, shape)
        if shape is not None and (own is None or not fits(own, shape)):
            own = of_all(at.labels, len(shape))
        found.append(own)
    return found


def _answer(at: At) -> Answer | None:
    name = at.node.name()
    rule, reads = _RULES.get(name, (None, ()))
    if name.startswith("ScaledDotProduct"):
        rule = _attention
    if rule is None or not knows(name, *reads):
        return None
    only_first = at.labels[0] is not None and all(one is None for one in at.labels[1:])
    return rule(at) if only_first or rule is _parts else None


# Each entry of an input's gradient comes from the same entry of the output's, before the sum over what was broadcast.
_BY_ENTRIES = (
    "Add Sub Rsub Mul Div Neg Abs Exp Expm1 Exp2 Log Log1P Log2 Log10 Sqrt Rsqrt Reciprocal Pow Sin Cos Tan Tanh Sigmoid "
    "Silu Gelu Relu Relu6 Elu Celu Selu LeakyRelu Hardtanh Hardswish Hardsigmoid Mish Softplus LogSigmoid Threshold Erf Erfc "
    "Clamp ClampMin ClampMax Where MaskedFill Maximum Minimum Lerp Addcmul Addcdiv NativeDropout Clone ToCopy Alias Expand Sign "
    "Logaddexp Atan Atan2 Sinh Cosh Complex Polar Conj"
)


@_rule(*_backward(_BY_ENTRIES))
def _entries(at: At) -> Answer:
    return [at.first if shape is None or _broadcasts(shape, at.shapes[0]) else None for shape in at.inputs]


def _broadcasts(shape: Shape, to: Shape) -> bool:
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(a in (1, b) for a, b in pairs)


@_rule(*_backward("View UnsafeView ReshapeAlias Squeeze Unsqueeze"))
def _views(at: At) -> Answer | None:
    shape = at.inputs[0]
    if shape is None or np.prod(shape) != np.prod(at.shapes[0]):
        return None
    return [reshaped(at.first, at.shapes[0], shape)]


@_rule("ViewAsComplexBackward0")
def _view_as_complex(at: At) -> Answer:
    return [np.expand_dims(at.first, -1)]


@_rule("ViewAsRealBackward0")
def _view_as_real(at: At) -> Answer:
    return [joined_along(at.first, [at.first.ndim - 1]).squeeze(-1)]


@_rule("TBackward0")
def _t(at: At) -> Answer:
    return [at.first.T]


@_rule("TransposeBackward0", reads=("axis", "other"))
def _transpose(at: At) -> Answer | None:
    if not at.shapes[0]:
        return None
    return [np.swapaxes(at.first, at.axis(at.shapes[0]), saved(at.node, "other") % len(at.shapes[0]))]


@_rule("PermuteBackward0", reads=("axes",))
def _permute(at: At) -> Answer:
    axes = [axis % len(at.shapes[0]) for axis in saved(at.node, "axes")]
    return [at.first.transpose(np.argsort(axes))]


@_rule("RepeatBackward0", reads=("times",))
def _repeat(at: At) -> Answer | None:
    if at.inputs[0] is None:
        return None
    times, found = saved(at.node, "times"), at.first
    for axis, (count, size) in enumerate(zip(times, at.shapes[0], strict=True)):
        if count > 1 and found.shape[axis] > 1:
            split = found.reshape((*found.shape[:axis], count, size // count, *found.shape[axis + 1 :]))
            found = joined_along(split, [axis]).reshape((*found.shape[:axis], size // count, *found.shape[axis + 1 :]))
    return [found]


@_rule(*_backward("Sum Mean", [1]), *_backward("Var Std LinalgVectorNorm Logsumexp Amax Amin", [0]), reads=("axes",))
def _reduced(at: At) -> Answer | None:
    shape = at.inputs[0]
    if shape is None or at.first.ndim == len(shape):
        return [at.first]
    axes = at.axes(shape)
    return [np.expand_dims(at.first, tuple(axes))] if at.first.ndim + len(axes) == len(shape) else None


@_rule(*_backward("Max Min Kthvalue", [0]), "MedianBackward1", reads=("axis",))
def _chosen(at: At) -> Answer | None:
    shape = at.inputs[0]
    if not shape or at.first.ndim == len(shape):
        return [at.first]
    return [np.expand_dims(at.first, at.axis(shape))]


@_rule(
    *_backward("Softmax LogSoftmax SafeSoftmax Cumsum Cumprod Cummax Cummin Logcumsumexp Sort Topk Gather", [0]),
    reads=("axis",),
)
def _along_axis(at: At) -> Answer | None:
    return [joined_along(at.first, [at.axis(at.shapes[0])])] if at.shapes[0] else None


@_rule(*_backward("Sort Topk Gather", [0]), reads=("axis", "index"))
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


@_rule("RollBackward0", reads=("axes", "shifts"))
def _roll(at: At) -> Answer | None:
    if not saved(at.node, "axes"):
        return None
    found = at.first
    for axis, shift in zip(saved(at.node, "axes"), saved(at.node, "shifts"), strict=True):
        found = np.roll(found, -shift, axis)
    return [found]


@_rule("FlipBackward0", reads=("axes",))
def _flip(at: At) -> Answer:
    return [np.flip(at.first, tuple(saved(at.node, "axes")))]


# ------------------------------------------------------------------------------------------------ parts and wholes


@_rule("SelectBackward0", reads=("axis", "index"))
def _select(at: At) -> Answer | None:
    if not (shape := at.inputs[0]):
        return None
    axis = at.axis(shape)
    index = np.array([saved(at.node, "index") % shape[axis]])
    return [put(np.expand_dims(at.first, axis), axis, index, shape[axis])]


@_rule("SliceBackward0", reads=("axis", "start", "stop", "step"))
def _slice(at: At) -> Answer | None:
    if not (shape := at.inputs[0]):
        return None
    axis = at.axis(shape)
    part = slice(*(saved(at.node, name) for name in ("start", "stop", "step")))
    return [put(at.first, axis, part, shape[axis])]


@_rule(*_backward("Split SplitWithSizes UnsafeSplit Unbind", [0]), reads=("axis",))
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


@_rule("CatBackward0", reads=("axis",))
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


@_rule("StackBackward0", reads=("axis",))
def _stack(at: At) -> Answer:
    axis = at.axis(at.shapes[0])
    if at.first.shape[axis] == 1:
        return [at.first.squeeze(axis)] * len(at.inputs)
    return [at.first.take([index], axis).squeeze(axis) for index in range(len(at.inputs))]


# ------------------------------------------------------------------------------------------------ indices


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


@_rule("IndexBackward0", reads=("indices",))
def _index(at: At) -> Answer | None:
    return _taken(at, at.indices)


@_rule("IndexSelectBackward0", reads=("axis", "index"))
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


@_rule("IndexPutBackward0", reads=("indices",))
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


@_rule(*_backward("IndexAdd IndexCopy", [0]), reads=("axis", "index"))
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


@_rule(*_backward("Scatter ScatterAdd", [0]), reads=("axis", "index"))
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


# ------------------------------------------------------------------------------------------------ products and layers


@_rule("MmBackward0", "BmmBackward0", "AddmmBackward0", "BaddbmmBackward0")
def _product(at: At) -> Answer:
    """Products of matrices or of stacks of matrices, possibly added to another tensor."""
    rows = at.first.ndim - 2
    return [*[at.first] * (len(at.inputs) - 2), joined_along(at.first, [rows + 1]), joined_along(at.first, [rows])]


@_rule("GroupedMmBackward0")
def _grouped_mm(at: At) -> Answer | None:
    """Groups of rows, each of which is multiplied by its own matrix."""
    left, right = at.inputs[:2]
    if len(at.shapes[0]) != 2 or (left is not None and len(left) != 2) or (right is not None and len(right) != 3):
        return None
    return [joined_along(at.first, [1]), None, *[None] * len(at.inputs[2:])]


def _attention(at: At) -> Answer:
    """Attention, where the first axis of the output and that of query, key and value count the same things."""
    return _first_axis(at, 3)


@_rule("ConvolutionBackward0", "NativeGroupNormBackward0")
def _of_first_input(at: At) -> Answer:
    return _first_axis(at, 1)


def _first_axis(at: At, count: int) -> Answer:
    """For the first ``count`` inputs, each index along the first axis comes from the same index of the output."""
    found = joined_along(at.first, range(1, at.first.ndim))
    keep = [shape is not None and shape[:1] == at.shapes[0][:1] and len(shape) == found.ndim for shape in at.inputs]
    return [found if index < count and keep[index] else None for index in range(len(at.inputs))]


@_rule("NativeLayerNormBackward0", "FusedRmsNormBackward0", reads=("shape",))
def _layer_norm(at: At) -> Answer:
    own = len(saved(at.node, "shape"))
    return [joined_along(at.first, range(at.first.ndim - own, at.first.ndim)), *[None] * len(at.inputs[1:])]
