"""What calls and nodes take, and what the samples of their outputs say of its entries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from torch_secorder.autograd.nodes import is_python_function, may_have_packed_tensors, output_shapes
from torch_secorder.autograd.saved import knows, saved
from torch_secorder.batch_axis.evidence import Evidence, Unplaced
from torch_secorder.batch_axis.label_rules import At, labels_of_inputs
from torch_secorder.batch_axis.labels import SEVERAL, Labels, joined_along, of_all
from torch_secorder.batch_axis.of_parameters import OF_A_TABLE
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.batch_axis.readings import labels_of
from torch_secorder.capture.own_axes import KEEPS_AXES, has_samples_first
from torch_secorder.capture.records import Record

# Kind of node -> our name of what it saved of an input -> which of its inputs that is.
INPUTS = {
    "MmBackward0": {"left": 0, "right": 1},
    "AddmmBackward0": {"left": 1, "right": 2},
    "BmmBackward0": {"left": 0, "right": 1},
    "BaddbmmBackward0": {"left": 1, "right": 2},
    "MvBackward0": {"left": 0},
    "MulBackward0": {"left": 0, "right": 1},
    "TrilinearBackward0": {"left": 0, "right": 2},
    "ConvolutionBackward0": {"input": 0},
    "NativeLayerNormBackward0": {"input": 0},
    "FusedRmsNormBackward0": {"input": 0},
    "NativeGroupNormBackward0": {"input": 0},
    "NativeBatchNormBackward0": {"input": 0},
    "PreluKernelBackward0": {"input": 0},
    OF_A_TABLE: {"ids": 0},
}

# Nodes of rows of anything, whose indices are no input of theirs, as those of a table's rows are none either.
OF_ROWS = ("IndexBackward0", "IndexSelectBackward0")

# Kinds of nodes that take data besides their inputs: places, or what chooses between numbers.
_CHOOSING = (
    "Index IndexSelect IndexAdd IndexCopy IndexFill IndexPut IndexPutImpl Gather Take MaskedFill MaskedSelect MaskedScatter "
    "Scatter ScatterAdd ScatterReduce"
)
CHOOSING = frozenset(f"{name}Backward{number}" for name in _CHOOSING.split() for number in range(3))


class Operand(NamedTuple):
    """What a call or a node takes.

    Attributes:
        value: what it takes.
        by: the call, or the node.
        place: which of the node's inputs it is.
    """

    value: Tensor
    by: Record | Node
    place: int = 0


def operands_of_calls(records: Iterable[Record]) -> Iterator[Operand]:
    """What calls were given first."""
    for record in records:
        if record.inputs and not record.inputs_packed and isinstance(record.inputs[0], Tensor):
            yield Operand(record.inputs[0], record)


def operands_of_nodes(nodes: Iterable[Node], *, packs: bool) -> Iterator[Operand]:
    """What nodes have saved of their inputs.

    Args:
        nodes: the nodes.
        packs: whether nodes are supposed to have their saved tensors with hooks where torch does not show it.
    """
    for node in nodes:
        kind = node.name()
        names = INPUTS.get(kind)
        if kind in OF_ROWS and not may_have_packed_tensors(node, packs) and (index := _index_of_rows(node)) is not None:
            yield Operand(index, node)
        if names is None or may_have_packed_tensors(node, packs):
            continue
        for name, place in names.items():
            if knows(kind, name) and (x := _saved(node, name)) is not None:
                yield Operand(x, node, place)


def takes_unseen_data(node: Node) -> bool:
    """Whether a node takes data, or may take some, that it does not keep."""
    if node.name() in INPUTS:
        return False
    return node.name() in CHOOSING or is_python_function(node) or None in [child for child, _ in node.next_functions]


def _saved(node: Node, name: str) -> Tensor | None:
    """What a node saved under a name of ours, as long as nobody has changed it in place."""
    x = _unchanged(node, name)
    return x if isinstance(x, Tensor) else None


def _unchanged(node: Node, name: str) -> Any:
    try:
        return saved(node, name)
    except RuntimeError:  # as a backward pass would say, too
        return None


def _index_of_rows(node: Node) -> Tensor | None:
    """The numbers of the rows that a node takes along the first axis; None if it takes something else."""
    kind = node.name()
    if kind == "IndexSelectBackward0":
        is_first = knows(kind, "axis") and saved(node, "axis") == 0
        return _saved(node, "index") if is_first and knows(kind, "index") else None
    if not knows(kind, "indices"):
        return None
    first, *others = _unchanged(node, "indices") or [None]
    is_index = first is not None and first.dtype in (torch.int32, torch.int64)
    return first if is_index and all(one is None for one in others) else None


def labels_of_operand(operand: Operand, found: Evidence, shape: Sequence[int], n: int) -> Labels | None:
    """For each entry of an operand the sample of the outputs that is computed from it; None if it is not known how it is used.

    Args:
        operand: what a call or a node takes.
        found: where the output of that has its samples.
        shape: the shape of this output.
        n: how many samples there are.
    """
    if isinstance(found, Placement):
        labels = labels_of(found, shape, n)
    elif found is Unplaced.SHARED_BY_SAMPLES:
        labels = np.full((1,) * len(shape), SEVERAL)
    else:
        return None
    x, by = operand.value, operand.by
    if not isinstance(by, Record):
        return _of_node(by, operand.place, labels, tuple(x.shape))
    if (own := _of_layer(by.site.module, labels, x.dim())) is not None:
        return own
    # All of it goes into all of the output, as far as is known of this layer, so that only one that has one sample tells.
    own = of_all([labels], x.dim())
    is_of_several = own is None or int(own.item()) == SEVERAL
    return None if is_of_several and found is not Unplaced.SHARED_BY_SAMPLES else own


def _of_node(node: Node, place: int, labels: Labels, shape: tuple[int, ...]) -> Labels | None:
    if node.name() == OF_A_TABLE:
        return _of_ids(labels)
    if node.name() in OF_ROWS:
        return joined_along(labels, range(len(shape), labels.ndim)).reshape(labels.shape[: len(shape)])
    inputs = [shape if one == place else None for one in range(len(node.next_functions))]
    shapes = output_shapes([node])
    several = [labels, *[None] * (len(shapes) - 1)]
    (own,) = labels_of_inputs(At(node, node.name(), several, shapes, inputs), [place])
    return own


def _of_layer(module: nn.Module, labels: Labels, dims: int) -> Labels | None:
    """The labels of a layer's input of so many axes; None for a layer of an unknown kind."""
    if isinstance(module, nn.Embedding):
        return _of_ids(labels) if dims == labels.ndim - 1 else None
    if dims != labels.ndim:
        return None
    if isinstance(module, KEEPS_AXES):
        return joined_along(labels, [dims - 1])
    return joined_along(labels, range(1, dims)) if has_samples_first(module, dims) else None


def _of_ids(labels: Labels) -> Labels:
    return joined_along(labels, [labels.ndim - 1]).reshape(labels.shape[:-1])
