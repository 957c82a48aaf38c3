"""The matrix that the model's outputs come out of, where their node shows one."""

from __future__ import annotations

from torch import Tensor

from torch_secorder.autograd.nodes import has_packed_tensors

# The names under which a node keeps the factors of its product.
FACTORS = {"AddmmBackward0": ("_saved_mat1", "_saved_mat2"), "MmBackward0": ("_saved_self", "_saved_mat2")}


def last_linear_factors(outputs: Tensor) -> tuple[Tensor, Tensor] | None:
    """``(h, M)``, ``[n, i]`` and ``[i, c]``, of outputs ``h M`` plus a bias; None if they are nothing of the kind.

    None as well where no gradient goes through the product to what made h, or where h was changed since.
    """
    node = outputs.grad_fn
    names = FACTORS.get("" if node is None else node.name())
    if names is None or has_packed_tensors(node):
        return None
    try:
        h, matrix = (getattr(node, name) for name in names)
    except RuntimeError:
        return None
    return None if h is None or matrix is None else (h.detach(), matrix.detach())
