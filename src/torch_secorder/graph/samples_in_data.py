"""Refusals of graphs that show something else for samples than the data has: rows of weights, or steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.autograd.graph import Node

from torch_secorder.autograd.nodes import value_shape
from torch_secorder.batch_axis.placement import FIRST, Placement
from torch_secorder.capture.model_run import Forward
from torch_secorder.capture.own_axes import has_one_sample, takes_whole, without_batch_axis
from torch_secorder.capture.records import Record
from torch_secorder.errors import ShapeError
from torch_secorder.graph.uses import Uses
from torch_secorder.graph.walk import Walk

# Products with a vector, which has no axis for samples.
OF_VECTORS = frozenset(["MvBackward0", "AddmvBackward0", "DotBackward0"])

PRODUCTS = frozenset(f"{name}Backward0" for name in ("Mm", "Addmm", "Bmm", "Baddbmm"))

# Nodes that compute their output from their inputs alone, and not from an index or a mask as well.
_NAMES = (
    "Addmm Mm Bmm Baddbmm Add Sub Mul Div Convolution Softmax LogSoftmax Tanh Sigmoid Relu Sum Mean "
    "NativeLayerNorm NativeGroupNorm FusedRmsNorm"
)
OF_INPUTS_ONLY = OF_VECTORS | {f"{name}Backward0" for name in _NAMES.split()}


def require_one_reading(
    forward: Forward, placed: Sequence[tuple[Tensor, Placement | None]], shared: Sequence[Record]
) -> None:
    """Raise if the samples may be on the second axis of an output, and nothing else is a reason for what all samples share.

    Read along steps or members of an ensemble in front, a layer on the samples looks as if all of these shared it.

    Args:
        forward: the run of the model.
        placed: the model's outputs, and where each is said to have its samples.
        shared: the calls of which all samples seem to share the output.
    """
    argument, n = forward.counting(), forward.n
    shapes = [tuple(x.shape) for x, where in placed if where == FIRST and x.dim() > 2 and x.shape[1] == n]
    if argument is None or not shapes:
        return
    for record in shared:
        if takes_whole(record, argument):
            raise ShapeError(
                f"{record.site}: it was given the model's {forward.count}, and read along axis 0 of an output of shape "
                f"{shapes[0]}, all of them share what it makes of each: if the samples are on axis 1 of that output, behind "
                "steps or members of an ensemble, pass batch_axis={'outputs': 1}; if the model mixes its samples, return the "
                "output with its other axes flattened"
            )


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
