"""The matrix product that ends a model, where the graph shows one."""

from __future__ import annotations

from torch import Tensor

from torch_secorder.autograd.nodes import has_packed_tensors
from torch_secorder.autograd.saved import knows, saved

PRODUCTS = ("AddmmBackward0", "MmBackward0")


def last_linear_factors(outputs: Tensor) -> tuple[Tensor, Tensor] | None:
    """The factors h, ``[n, i]``, and M, ``[i, c]``, of outputs ``h M`` with or without a bias.

    They are None if the outputs are nothing of the kind, if no gradient goes through the product to what made h, or if one
    of the factors was changed in place since.
    """
    node = outputs.grad_fn
    if node is None or node.name() not in PRODUCTS or not knows(node.name(), "left", "right"):
        return None
    if has_packed_tensors(node) is not False:
        return None
    try:
        h, matrix = saved(node, "left"), saved(node, "right")
    except RuntimeError:  # torch raises it for a saved tensor that was changed in place.
        return None
    return None if h is None or matrix is None else (h.detach(), matrix.detach())
