"""What a graph leaves open: whether its shapes are ambiguous, and whether its samples change their order."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from torch_secorder.autograd.nodes import value_shape
from torch_secorder.autograd.saved import knows, saved
from torch_secorder.autograd.versions import SameTensor
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.errors import ShapeError

# Nodes that may put samples into another order, if they work along an axis of samples.
_NAMES = (
    "Index IndexSelect IndexPut IndexAdd IndexCopy IndexReduce Gather Scatter ScatterAdd ScatterReduce Take Put MaskedSelect "
    "MaskedScatter Flip Roll Sort Topk Embedding Mm Bmm Addmm Baddbmm Mv"
)

# Nodes that put a part among others. Where it goes is seen to be of no importance, or nothing is remembered.
_NESTS = {f"{name}Backward0" for name in ("ConstantPadNd", "SliceScatter", "SelectScatter", "Where")} | {
    "torch::autograd::CopySlices"
}
REORDERS = {f"{name}Backward{version}" for name in _NAMES.split() for version in (0, 1)} | _NESTS | {"SumBackward1"}

_PRODUCTS = {f"{name}Backward0" for name in ("Mm", "Addmm", "Bmm", "Baddbmm", "Mv")}

# Those of them that take rows of their first input. From a weight they take what no sample is in.
TAKES_ROWS = {f"{name}Backward0" for name in ("Embedding", "Index", "IndexSelect", "Gather")}

# Those that one index along one axis tells everything of.
_WITH_INDEX = "IndexSelect IndexAdd IndexCopy Gather Scatter ScatterAdd Sort Topk"
PLACED_BY_INDEX = {f"{name}Backward0" for name in _WITH_INDEX.split()}

# Nodes that take some entries along an axis. Two graphs that put entries together in another order differ in what they take.
PICKS = {"SelectBackward0", "SliceBackward0"}

# These nodes, and those that take an axis apart. Their outputs may be put together again in another order.
PARTS = PICKS | {f"{name}Backward0" for name in ("Unbind", "Split", "SplitWithSizes", "UnsafeSplit")}


# Nodes that carry something from each index along an axis to all later ones, as a cumulative sum does.
CARRIES = {f"{name}Backward0" for name in ("Cumsum", "Cumprod", "Cummax", "Cummin", "Logcumsumexp")}

# Fused attention, whose output has its positions on the last axis but one. Each of them takes something of others.
_KINDS = (
    "FlashAttentionForCpu",
    "FlashAttention",
    "EfficientAttention",
    "CudnnAttention",
    "FusedAttentionOverrideable",
)
ATTENDS = {f"ScaledDotProduct{kind}Backward0" for kind in _KINDS}


@dataclass(frozen=True)
class CarriedAxis:
    """The output of a node that carries something along an axis, on which no samples can be.

    Attention among the tokens of several samples, which a mask keeps apart, has more tokens than samples there.

    Attributes:
        name: the node's.
        axis: the axis.
        shape: the output's.
        edge: where the output's gradient arrives.
    """

    name: str
    axis: int
    shape: tuple[int, ...]
    edge: GradientEdge

    @classmethod
    def of(cls, node: Node, n: int | None) -> CarriedAxis | None:
        """That of a node which is known to carry; None for one without axes, and where this torch doesn't show its axis."""
        name, shape = node.name(), value_shape(node, 0)
        if name in ATTENDS:
            return cls(name, len(shape) - 2, shape, GradientEdge(node, 0)) if shape[-2] == n else None
        if not shape or not knows(name, "axis"):
            return None
        return cls(name, saved(node, "axis") % len(shape), shape, GradientEdge(node, 0))

    def contradicts_shapes(self, n: int) -> bool:
        """Whether the axis may be taken for that of n samples."""
        return self.shape[self.axis] == n

    def contradicts(self, found: Placement) -> bool:
        """Whether samples that were found there are on the axis."""
        return found.axis == self.axis

    def refusal(self, n: int) -> ShapeError:
        """The refusal of samples that are on the axis."""
        return ShapeError(
            f"{self.name} carries something along axis {self.axis} of a tensor of shape {self.shape} from one index to others, "
            f"where the model's {n} samples would be: pass batch_axis= if the model's inputs and outputs have their samples on "
            "another axis than the first; a cumulative sum or attention over samples leaves none a gradient of its own"
        )


# Both are remembered, since step after step has the same shapes.
@lru_cache(64)
def size_pattern(n: int, shapes: tuple[tuple[int, ...], ...]) -> int:
    """A hash of which sizes in these shapes equal each other, and which equal n; other batch sizes give the same one."""
    sizes = {n: 0}
    return hash(tuple([tuple([sizes.setdefault(size, len(sizes)) for size in shape]) for shape in shapes]))


@lru_cache(64)
def has_ambiguous_axis(n: int, shapes: tuple[tuple[int, ...], ...]) -> bool:
    """Whether some shape has n indices on another axis than the first."""
    return any(n in shape[1:] for shape in set(shapes))


def may_reorder(node: Any, n: int) -> bool:
    """Whether one of the nodes in ``REORDERS`` may put n samples into another order.

    It may unless it is seen to keep the order that is there, or leaves an axis alone on which the samples are likely to be.
    A node that doesn't show its axis may.
    """
    name = node.name()
    if name in _PRODUCTS:
        return _mixes_rows(node, n)
    if name in _NESTS:
        return any(_puts_samples(node, child, nr, n) for child, nr in node.next_functions if child is not None)
    if name == "SumBackward1":
        return _sums_what_is_spread(node, n)
    if name in TAKES_ROWS and _is_weight(node.next_functions[0][0]):
        return False  # nothing lies behind the weight, and what is taken of it is wherever it is used
    shape = _input_shape(node, 0)
    if name in ("FlipBackward0", "RollBackward0") and knows(name, "axes"):
        axes = saved(node, "axes")  # A roll without axes moves all entries.
        return not axes or any(_may_count(shape[axis % len(shape)], n) for axis in axes)
    if not shape or name not in TAKES_ROWS | {"SortBackward0", "TopkBackward0"}:
        return True
    if name == "EmbeddingBackward0":
        return _moves(shape, {0}, n)
    if name == "IndexBackward0":
        return not knows(name, "indices") or _moves(shape, _indexed(saved(node, "indices"), shape), n)
    if not knows(name, "axis", "index"):
        return True
    axis = saved(node, "axis") % len(shape)
    if name == "IndexSelectBackward0" and _in_order(saved(node, "index"), shape[axis]):
        return False
    return _moves(shape, {axis}, n)


def _indexed(indices: Sequence[Tensor | None], shape: Sequence[int]) -> set[int]:
    """The axes along which indices take something else than all entries in turn. A mask has as many axes as it has itself."""
    found: set[int] = set()
    axis = 0
    for index in indices:
        count = 1 if index is None or index.dtype not in (torch.bool, torch.uint8) else index.dim()
        if index is not None and not (count == 1 and _in_order(index, shape[axis])):
            found.update(range(axis, axis + count))
        axis += count
    return found


def _moves(shape: Sequence[int], moved: set[int], n: int) -> bool:
    """Whether samples may be moved along these axes of a value.

    A buffer with one row more than there is room for tokens has samples on an axis that is no multiple of n. They stay where
    they are only if they are on an axis that is not moved along.
    """
    if not moved or any(_may_count(shape[axis], n) for axis in moved):
        return bool(moved)
    return not any(_has_samples(shape, axis, n) for axis in range(len(shape)) if axis not in moved)


def _has_samples(shape: Sequence[int], axis: int, n: int) -> bool:
    """Whether an axis is likely to be that of the samples: the first, or one of n indices that is not the features'."""
    return _may_count(shape[0], n) if axis == 0 else axis < len(shape) - 1 and shape[axis] == n


# How many entries an index may have to be compared with that of the graph before.
LARGEST_INDEX = 2**20


def order_given_by(node: Any) -> Hashable | None:
    """What decides where a node puts entries; None for a node that doesn't show it.

    It is equal for two nodes that put their entries alike. Of an index on the host it has the numbers themselves, so that it
    doesn't matter whether they come from the data. The host would have to wait in every step for those of another device, so that
    such an index is known by being the same tensor, which nobody has changed.
    """
    name = node.name()
    if name in ("FlipBackward0", "RollBackward0") and knows(name, "axes"):
        return name, saved(node, "axes"), saved(node, "shifts") if knows(name, "shifts") else ()
    if name in ("IndexBackward0", "IndexPutBackward0") and knows(name, "indices"):
        return _numbers(name, saved(node, "indices"))
    if name in PLACED_BY_INDEX and knows(name, "axis", "index"):
        return _numbers(name, (saved(node, "index"),), saved(node, "axis"))
    return None


def _numbers(name: str, indices: Sequence[Tensor | None], axis: int = 0) -> Hashable | None:
    """What some indices are; None if they are too many, or don't count their changes."""
    found: list[Hashable] = [name, axis]
    for index in indices:
        if index is None:
            found.append(None)
        elif index.numel() > LARGEST_INDEX:
            return None
        elif index.device.type == "cpu":
            found.append((tuple(index.shape), index.dtype, index.numpy().tobytes()))
        elif index.is_inference():
            return None
        else:
            found.append(SameTensor.of(index))
    return tuple(found)


def picked(node: Any, n: int) -> tuple[int, int] | None:
    """The axis along which a node picks samples, if it does, and where it begins."""
    name, shape = node.name(), _input_shape(node, 0)
    where = "index" if name == "SelectBackward0" else "start"
    if not shape or not knows(name, "axis", where):
        return None
    axis = saved(node, "axis") % len(shape)
    return (axis, saved(node, where)) if _may_count(shape[axis], n) else None


def takes_samples_apart(node: Any, n: int) -> bool:
    """Whether one of these nodes takes some of n samples, or all of them one by one."""
    shape = _input_shape(node, 0)
    if not shape or not knows(node.name(), "axis"):
        return bool(shape)
    axis = saved(node, "axis") % len(shape)
    return shape[axis] == n or (axis == 0 and _may_count(shape[0], n))


def _mixes_rows(node: Any, n: int) -> bool:
    """Whether a product may put samples into another order, as that with a permutation matrix does.

    It may if samples are on the axis that is summed over. In a product with a weight they are not, nor in one of a batch of
    matrices with one or several for each sample, as attention is.
    """
    (left, left_nr), (right, right_nr) = node.next_functions[-2:]
    output = value_shape(node, 0)
    if len(output) == 3 and _may_count(output[0], n):
        return False
    if right is not None:
        if _is_weight(right) or _is_made_of_weights(right):
            return False
        shape = value_shape(right, right_nr)
        summed, rows = shape[-2 if len(shape) > 1 else 0], output[-2 if len(shape) > 1 else 0]
        if left is not None and summed != n and right.name() in _TRANSPOSES and output[-1] == n:
            return False  # the scores of all pairs of samples, which are where they were
        # Where there are as many rows as samples, they may come from a buffer of any size.
        return _may_count(summed, n) or _may_count(rows, n)
    if left is None or _is_weight(left) or _is_made_of_weights(left):
        return False
    # A matrix without a gradient is on the right: a frozen weight, unless samples are on the columns that it takes.
    shape = value_shape(left, left_nr)
    return _may_count(shape[-1], n) and (shape[-1] == n or len(shape) < 2 or not _may_count(shape[-2], n))


def _puts_samples(node: Any, child: Any, nr: int, n: int) -> bool:
    """Whether one input of a node may be some sample's, that goes where the node says."""
    while child.name() == "ExpandBackward0" and child.next_functions[0][0] is not None:
        child, nr = child.next_functions[0]
    whole, part = value_shape(node, 0), value_shape(child, nr)
    if not whole or _is_weight(child) or _is_made_of_weights(child):
        return False
    if not _may_count(whole[0], n):
        return False
    if part[:1] == whole[:1] and (len(part) == len(whole) or part[0] != whole[-1]):
        return False  # each sample has a part of its own
    return whole[0] == n or not (len(whole) > 2 and whole[1] == n and n in part[:2])


def _sums_what_is_spread(node: Any, n: int) -> bool:
    """Whether a sum over samples takes a product in which each has been spread along another axis that may count samples."""
    product = node.next_functions[0][0]
    if product is None or product.name() != "MulBackward0" or not knows(node.name(), "axes"):
        return False
    shape = value_shape(product, 0)
    summed = {axis % len(shape) for axis in saved(node, "axes")} if shape else set()
    if not any(_may_count(shape[axis], n) for axis in summed):
        return False
    for child, nr in product.next_functions:
        if child is None or _is_weight(child) or _is_made_of_weights(child):
            continue
        own = value_shape(child, nr)
        own = (1,) * (len(shape) - len(own)) + own
        axes = [axis for axis in range(len(shape)) if axis not in summed and own[axis] == 1 != shape[axis]]
        if any(_has_samples(shape, axis, n) for axis in axes):
            return True
    return False


_TRANSPOSES = ("TBackward0", "TransposeBackward0", "PermuteBackward0")

# Nodes whose output may have the shape of a weight because it is one, changed by a mask or scaled by a number.
_SCALES = ("MulBackward0", "DivBackward0", "AddBackward0", "SubBackward0")

# How many nodes lead from a computed weight to the leaves that it is computed from.
_NODES_OF_A_WEIGHT = 16


def _is_weight(node: Any) -> bool:
    """Whether a value is a leaf, or the transpose of one."""
    while node is not None and node.name() in ("TBackward0", "TransposeBackward0"):
        node = node.next_functions[0][0]
    return node is None or hasattr(node, "variable")


def _is_made_of_weights(node: Any) -> bool:
    """Whether a few nodes compute a value from parameters alone, as that of a merged or scaled weight."""
    stack, met = [node], 0
    while stack:
        current, met = stack.pop(), met + 1
        if isinstance(getattr(current, "variable", None), nn.Parameter):
            continue
        inputs = [edge for edge in current.next_functions if edge[0] is not None]
        # What has no gradient may be the data. It has not gone into what still has the shape of a weight.
        whole = len(inputs) == len(current.next_functions)
        scaled = current.name() in _SCALES and any(value_shape(*edge) == value_shape(current, 0) for edge in inputs)
        if not inputs or met > _NODES_OF_A_WEIGHT or not (whole or scaled):
            return False
        stack.extend(child for child, _ in inputs)
    return True


def _input_shape(node: Any, index: int) -> tuple[int, ...]:
    child, nr = node.next_functions[index]
    return () if child is None else value_shape(child, nr)


def _may_count(size: int, n: int) -> bool:
    return size > 0 and size % n == 0


def _in_order(index: Tensor, size: int) -> bool:
    """Whether an index takes all entries in turn; on other devices than the host nobody waits to know."""
    return (
        index.device.type == "cpu"
        and index.shape == (size,)
        and bool((index == torch.arange(size, device="cpu")).all())
    )
