"""The matrix that the model's outputs come out of, where their node shows one."""

from __future__ import annotations

from torch import Tensor

from torch_secorder.autograd.nodes import has_packed_tensors
from torch_secorder.autograd.saved import knows, saved

PRODUCTS = ("AddmmBackward0", "MmBackward0")


def last_linear_factors(outputs: Tensor) -> tuple[Tensor, Tensor] | None:
    """``(h, M)``, ``[n, i]`` and ``[i, c]``, of outputs ``h M`` plus a bias; None if they are nothing of the kind.

    None as well where no gradient goes through the product to what made h, or where h was changed since.
    """
    node = outputs.grad_fn
    if node is None or node.name() not in PRODUCTS or not knows(node.name(), "left", "right"):
        return None
    if has_packed_tensors(node) is not False:
        return None
    try:
        h, matrix = saved(node, "left"), saved(node, "right")
    except RuntimeError:
        return None
    return None if h is None or matrix is None else (h.detach(), matrix.detach())
