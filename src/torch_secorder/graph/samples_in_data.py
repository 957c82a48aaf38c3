"""What takes the data in a graph, and whether it takes it for the samples: rows of weights are none, nor are steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import Node

from torch_secorder.autograd.engine import without_modes
from torch_secorder.autograd.nodes import value_shape
from torch_secorder.batch_axis.argument_samples import ArgumentSamples, labels_in
from torch_secorder.batch_axis.labels import Labels
from torch_secorder.batch_axis.same_rows import first_of_same_rows
from torch_secorder.batch_axis.search import SampleSearch
from torch_secorder.capture.model_run import Forward
from torch_secorder.capture.own_axes import has_one_sample, without_batch_axis
from torch_secorder.capture.records import Record
from torch_secorder.graph.call_places import wanted_of_calls
from torch_secorder.graph.graph import Graph
from torch_secorder.graph.operands import (
    Operand,
    labels_of_operand,
    operands_of_calls,
    operands_of_nodes,
    takes_unseen_data,
)
from torch_secorder.graph.uses import Uses
from torch_secorder.graph.walk import Walk
from torch_secorder.graph.wanted import wanted_of_nodes
from torch_secorder.model.parameters import Table

# Products with a vector, which has no axis for samples.
OF_VECTORS = frozenset(["MvBackward0", "AddmvBackward0", "DotBackward0"])

PRODUCTS = frozenset(f"{name}Backward0" for name in ("Mm", "Addmm", "Bmm", "Baddbmm"))

# Nodes that compute their output from their inputs alone, and not from an index or a mask as well.
_NAMES = (
    "Addmm Mm Bmm Baddbmm Add Sub Mul Div Convolution Softmax LogSoftmax Tanh Sigmoid Relu Sum Mean "
    "NativeLayerNorm NativeGroupNorm FusedRmsNorm"
)
OF_INPUTS_ONLY = OF_VECTORS | {f"{name}Backward0" for name in _NAMES.split()}


def takes_all_samples(graph: Graph, search: SampleSearch, table: Table) -> dict[str, bool]:
    """What takes something that was made of an argument, in words, and whether it takes all samples for each of the outputs'.

    Where nothing was made of one, and all data is seen, that is said of what takes the same rows of data for each of them.
    """
    forward, walk = graph.forward, graph.walk
    n = forward.n or 0
    operands = list(operands_of_calls(record for record, _ in walk.calls))
    # All ranks search at the same places, and what they find in their own data may differ.
    if not table.ranks.distributed:
        nodes = (node for node in walk.nodes if node not in walk.records)
        operands += operands_of_nodes(nodes, packs=forward.has_packed_inputs)
    # All samples may share another argument than the one that counts them, as they do a mask of steps.
    counting = [one for one in forward.inputs if one[0] is forward.count.why or tuple(one[0].shape).count(n) == 1]
    with without_modes(), torch.no_grad():
        arguments = [ArgumentSamples(x, seen.axis) for seen, x in counting if isinstance(seen.axis, int)]
        made_of = labels_in([one.value for one in operands], arguments, n)
    found: dict[str, bool] = {}
    of_arguments = [(one, several) for one, several in zip(operands, made_of, strict=True) if several]
    for one, labels, several in _with_labels(graph, search, of_arguments):
        name = _name_of(one.by, walk, table)
        for data in several:
            if (takes_all := _takes_all(labels, data, n)) is not None:
                found[name] = found.get(name, True) and takes_all
    # What requires a gradient and is no parameter is data that is not looked at.
    if of_arguments or table.ranks.distributed or walk.other_leaves:
        return found
    if any(takes_unseen_data(node) for node in walk.nodes if node not in walk.records):
        return found
    others = [(one, several) for one, several in zip(operands, made_of, strict=True) if not one.value.requires_grad]
    taken = list(_with_labels(graph, search, others))
    if len(taken) < len(others):
        return found
    with without_modes(), torch.no_grad():
        same = first_of_same_rows([(one.value, labels) for one, labels, _ in taken], n)
    return {} if same is None else {_name_of(taken[same][0].by, walk, table): True}


def _with_labels(
    graph: Graph, search: SampleSearch, operands: Sequence[tuple[Operand, list[Labels]]]
) -> Iterator[tuple[Operand, Labels, list[Labels]]]:
    """Of operands those of which is known which samples of the outputs are computed from them, with these and with what came."""
    calls = graph.walk.calls
    wanted = {record: one for (record, _), one in zip(calls, wanted_of_calls(calls), strict=True)}
    places = wanted_of_nodes([one.by for one, _ in operands if not isinstance(one.by, Record)])
    if places:
        search(list(places.values()))
    for one, several in operands:
        key, _, shape = wanted[one.by] if isinstance(one.by, Record) else places[one.by]
        evidence = search.placements.evidence.get(key)
        if evidence is not None and search.placements.is_proven(key):
            labels = labels_of_operand(one, evidence, shape, graph.forward.n or 0)
            if labels is not None:
                yield one, labels, several


def _name_of(node: Record | Node, walk: Walk, table: Table) -> str:
    """What a call or a node is, and the nearest parameter that a node takes something of."""
    if isinstance(node, Record):
        return str(node.site)
    level: list[Node] = [node]
    seen = {node}
    while level:  # from one to all that it takes
        level = [
            child for one in level for child, _ in walk.children.get(one, ()) if child is not None and child not in seen
        ]
        seen.update(level)
        if (leaf := next((one for one in level if one in walk.leaves), None)) is not None:
            return f"{table.names[walk.leaves[leaf]]}, used by {node.name()}"
    return node.name()


def _takes_all(labels: Labels, data: Labels, n: int) -> bool | None:
    """Whether each sample of the outputs is computed from all samples of an argument; None if this does not show.

    Args:
        labels: for each entry of something that was made of the argument, the sample of the outputs.
        data: for each entry of it the sample of the argument.
        n: how many samples there are.
    """
    of_outputs, of_data = np.broadcast_arrays(labels, data)
    pairs = np.unique(np.stack([of_outputs.ravel(), of_data.ravel()]), axis=1)
    counts = {int(label): int((pairs[0] == label).sum()) for label in np.unique(pairs[0])}
    if any(label >= 0 and count < n for label, count in counts.items()):
        return False
    return True if len(np.unique(pairs[1])) == n and n in counts.values() else None


def require_data(walk: Walk, shared: Sequence[Record], uses: Uses, forward: Forward, others: Sequence[Tensor]) -> None:
    """Raise if a layer took something for a single sample, and nothing else in the graph takes any data.

    The model was called on one sample then, and what seems to have samples are the rows of a layer's own weight.
    """
    if uses.idle or not uses.placed or any(record.placement is not None for record, _ in walk.calls):
        return
    alone = [record for record in shared if has_one_sample(record)]
    vectors = [node for node in walk.children if _is_of_a_vector(node) and _takes_constants(node)]
    of_model = set(map(id, others))
    # An input that needs a gradient is data, too.
    if not (alone or vectors) or any(id(getattr(leaf, "variable", None)) not in of_model for leaf in walk.other_leaves):
        return
    if all(node.name() in OF_INPUTS_ONLY and not _takes_constants(node) for _, node in uses.placed):
        what = str(alone[0].site) if alone else f"the product {vectors[0].name()}"
        shape = f"an input of shape {tuple(alone[0].inputs[0].shape)}" if alone and alone[0].inputs else "a vector"
        raise without_batch_axis(what, shape, forward.n or 0)


def _is_of_a_vector(node: Node) -> bool:
    """Whether a node is a product with a vector, or with one row, which torch makes of a vector."""
    one_row = node.name() in PRODUCTS and math.prod(shape := value_shape(node, 0)) == shape[-1]
    return node.name() in OF_VECTORS or one_row


def _takes_constants(node: Node) -> bool:
    return None in [child for child, _ in node.next_functions]
