"""Outputs that are computed from parameters alone, which all samples share, although one may have as many rows as samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from torch_secorder.autograd.engine import without_modes
from torch_secorder.autograd.nodes import Edge, may_have_packed_tensors, value_shape
from torch_secorder.autograd.saved import knows, saved
from torch_secorder.batch_axis.argument_samples import shows_numbers
from torch_secorder.batch_axis.placement import Placement


def _nodes(names: str) -> frozenset[str]:
    return frozenset(f"{name}Backward{version}" for name in names.split() for version in range(6))


# Each entry is computed from those of its own tensor, and possibly from constants.
ON_THEIR_OWN = _nodes(
    "Add Sub Rsub Mul Div Neg Abs Exp Exp2 Expm1 Log Log1P Log2 Sqrt Rsqrt Reciprocal Pow Sin Cos Tanh Sigmoid LogSigmoid Relu "
    "LeakyRelu Elu Gelu Silu Softplus Hardtanh Clamp ClampMin ClampMax Softmax LogSoftmax Cumsum Clone Alias ToCopy "
    "Maximum Minimum Where MaskedFill NativeLayerNorm"
)
# Entries move, are left out or are summed. None is repeated, as for each sample.
MOVED = _nodes(
    "T Transpose Permute View UnsafeView ReshapeAlias Unsqueeze Squeeze Select Slice Sum Mean LinalgVectorNorm Norm Logsumexp"
)
PRODUCTS = _nodes("Mm Addmm Mv")
EXPANDED = _nodes("Expand")


# The node of a table's rows.
OF_A_TABLE = "EmbeddingBackward0"


def without_those_of_parameters(
    outputs: Sequence[Tensor],
    placements: list[Placement | None],
    n: int | None,
    arguments: Sequence[tuple[object, Tensor]],
    *,
    packs: bool,
) -> list[Placement | None]:
    """Where a model's outputs have their n samples, if those that are computed from parameters alone have none.

    A single output is left where its shape says, since nothing else would have samples then.

    Args:
        outputs: the outputs.
        placements: where their shapes say that they have the samples.
        n: how many samples there are.
        arguments: the model's arguments that count the samples, each behind what says so.
        packs: whether nodes are supposed to have their saved tensors with hooks where torch does not show it.
    """
    if n is None or n < 2:
        return placements
    found = [
        None if where is not None and x.grad_fn is not None and is_of_parameters(x.grad_fn, arguments, packs) else where
        for x, where in zip(outputs, placements, strict=True)
    ]
    return found if any(where is not None for where in found) else placements


def is_of_parameters(root: Node, arguments: Sequence[tuple[object, Tensor]], packs: bool) -> bool:
    """Whether a node's output is computed from parameters, and from constants that are no larger than these."""
    stack, seen = [root], {root}
    while stack:
        node = stack.pop()
        if (leaf := getattr(node, "variable", None)) is not None:
            if not isinstance(leaf, nn.Parameter):
                return False
            continue
        taken = [(child, nr) for child, nr in node.next_functions if child is not None]
        if not taken or not (_repeats_nothing(node, taken) or _takes_rows_in_order(node, arguments, packs)):
            return False
        stack += [child for child in dict.fromkeys(child for child, _ in taken) if child not in seen]
        seen.update(stack)
    return True


def _takes_rows_in_order(node: Node, arguments: Sequence[tuple[object, Tensor]], packs: bool) -> bool:
    """Whether a node looks up the rows of a table one after another, by numbers that are no argument's."""
    if node.name() != OF_A_TABLE or not knows(OF_A_TABLE, "ids") or may_have_packed_tensors(node, packs):
        return False
    with without_modes():
        try:
            ids = saved(node, "ids")
        except RuntimeError:  # It was changed in place, as a backward pass would say, too.
            return False
        if not torch.equal(ids.flatten(), torch.arange(ids.numel(), dtype=ids.dtype, device=ids.device)):
            return False
        integers = [x for _, x in arguments if shows_numbers(x) and not x.is_floating_point() and x.shape == ids.shape]
        return not any(torch.equal(x.to(ids.dtype), ids) for x in integers)


def _repeats_nothing(node: Node, taken: Sequence[Edge]) -> bool:
    """Whether a node is known to take no data with a row for each sample, and to make no such rows of what it takes."""
    name = node.name()
    if name in ON_THEIR_OWN:  # A constant that is larger has the samples, or repeats something for each of them.
        return value_shape(node, 0) in [value_shape(*edge) for edge in taken]
    if name in EXPANDED:
        shape, own = value_shape(node, 0), value_shape(*taken[0])
        return len(shape) == len(own) and shape[:1] == own[:1]
    return name in MOVED or (name in PRODUCTS and len(taken) == len(node.next_functions))
