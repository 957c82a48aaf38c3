"""The matrix product that ends a model, if the graph shows one."""

from __future__ import annotations

import math

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from torch_secorder.autograd.nodes import has_packed_tensors, value_shape
from torch_secorder.autograd.saved import knows, saved
from torch_secorder.graph.uses import ParameterUse

# Node of a product -> which of its inputs is the left factor; the right one comes next.
PRODUCTS = {"AddmmBackward0": 1, "MmBackward0": 0}


# Nodes of views that only give the rows of a product several axes.
VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")


def last_product(outputs: Tensor) -> Node | None:
    """The node of the product that made outputs ``[n, ..., c]``, each row of which is a position of a sample; None for others."""
    node: Node | None = outputs.grad_fn
    rows, classes = (math.prod(outputs.shape[:-1]), outputs.shape[-1]) if outputs.dim() > 1 else (0, 0)
    while node is not None and node.name() in VIEWS:
        node = node.next_functions[0][0]
    if node is None or node.name() not in PRODUCTS or value_shape(node, 0) != (rows, classes):
        return None
    return node


def last_linear_factors(outputs: Tensor) -> tuple[Tensor, Tensor] | None:
    """The factors h, ``[rows, i]``, with its graph, and M, ``[i, c]``, of outputs ``h M`` with or without a bias.

    The result is None if the outputs were made in another way, if no gradient goes through the product to the layers before, or
    if one of the factors was changed in place since.
    """
    node = last_product(outputs)
    if node is None or not knows(node.name(), "left", "right") or has_packed_tensors(node) is not False:
        return None
    try:
        h, matrix = saved(node, "left"), saved(node, "right")
    except RuntimeError:  # torch raises it for a saved tensor that was changed in place.
        return None
    return None if h is None or matrix is None else (h, matrix.detach())


def inputs_of_last_product(node: Node, use: ParameterUse) -> GradientEdge | None:
    """Where the gradient of a product's left factor arrives, if the right factor and the bias are parameters.

    The result is None if the product's squared norms don't go by sizes, if the product or its bias is scaled, or if nothing
    comes before it.
    """
    left = PRODUCTS.get(node.name())
    if left is None or not norms_go_by_sizes(node, use):
        return None
    if left == 1 and not saved(node, "alpha") == saved(node, "beta") == 1:
        return None
    made_by, nr = node.next_functions[left]
    return None if made_by is None else GradientEdge(made_by, nr)


def norms_go_by_sizes(node: Node, use: ParameterUse) -> bool:
    """Whether a use's squared norms are ``||g_n||^2`` times a factor that is the same for all gradients g_n of a row.

    That is so where samples in rows are multiplied by a parameter, to which a bias may be added. It is not if one of the
    parameters is used elsewhere, too, or if its entries are changed, and not only moved, before they enter the product.
    """
    left = PRODUCTS.get(node.name())
    if left is None or use.placement.axis != 0 or not knows(node.name(), "left", "right"):
        return False
    if left == 1 and not knows(node.name(), "alpha", "beta"):
        return False
    others = {index for index, (made_by, _) in enumerate(node.next_functions) if made_by is not None} - {left}
    if others != {index for index, _ in use.values}:
        return False
    features = {value.shape[-1:] for _, value in use.values}
    whole = all(len(value.shape) == (2 if index > left else 1) for index, value in use.values)
    ways = use.ways
    # A part of a parameter has gradients of the part's norm, too.
    moved = all(isinstance(target, int) and vjp.permutation is not None for target, vjp in ways)
    alone = all(use.forward.calls[target] == 1 for target, _ in ways if isinstance(target, int))
    return len(features) == 1 and whole and moved and alone
