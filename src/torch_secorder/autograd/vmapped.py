"""Calls of nodes with the gradients of many samples at once, which torch's rules for ``vmap`` take apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from torch_secorder.autograd.engine import active_modes
from torch_secorder.autograd.nodes import is_plain, node_vjp
from torch_secorder.autograd.opaque import Gradients
from torch_secorder.autograd.saved import knows, saved

_functorch: Any = torch._C._functorch

# Kinds of nodes whose gradients are made of operations that all have such a rule, by version. Torch would take the samples of
# any other operation in turn, and warn of it.
_NAMES = {
    0: (
        # Entries that move, or are left out.
        "T Transpose Permute View UnsafeView ReshapeAlias Unsqueeze Squeeze Alias Clone ToCopy Select Slice Split SplitWithSizes "
        "UnsafeSplit Unbind Expand Repeat Cat Stack Flip Roll Rot90 ConstantPadNd Index IndexSelect IndexPut IndexAdd Gather "
        "ScatterAdd Embedding Diagonal DiagEmbed Tril Triu "
        # Each entry from those in the same place.
        "Add Sub Rsub Mul Div Neg Abs Sign Exp Exp2 Expm1 Log Log1P Log2 Log10 Sqrt Rsqrt Reciprocal Pow Sin Cos Tan Atan Atan2 "
        "Sinh Cosh Tanh Sigmoid LogSigmoid Logit Relu Threshold LeakyRelu PreluKernel Elu Celu Gelu Silu Softplus Hardtanh "
        "Hardsigmoid Hardswish Erf Erfinv Round Floor Clamp ClampMin ClampMax Maximum Minimum Logaddexp Where MaskedFill Lerp "
        "Addcmul Addcdiv "
        # Entries from several.
        "Sum Mean Prod Var Std VarMean StdMean Amax Amin Max Min Cumsum Cumprod Logcumsumexp Logsumexp LinalgVectorNorm Norm "
        "Softmax LogSoftmax Glu Trace Mm Bmm Mv Dot Addmm Addmv Baddbmm LinalgCross LinalgInvEx LinalgSolveEx LinalgMatrixExp "
        "LinalgCholeskyEx NativeLayerNorm NativeGroupNorm NativeBatchNorm Convolution AvgPool2D AdaptiveAvgPool2D "
        "UpsampleNearest1D UpsampleNearest2D UpsampleLinear1D UpsampleBilinear2D UpsampleBicubic2D UpsampleBilinear2DAa "
        "UpsampleBicubic2DAa"
    ),
    1: "Add Rsub Squeeze Pow Clamp Lerp Sum Mean Prod Max Norm T Transpose Unsqueeze",
    2: "Squeeze Pow Div",
    3: "Squeeze",
    4: "Squeeze",
    5: "Squeeze",
}
AT_ONCE = frozenset(f"{name}Backward{version}" for version, names in _NAMES.items() for name in names.split())


def _weight_norm(node: Any, grad: Tensor) -> list[Tensor]:
    """The gradients of ``v`` and ``g``, of which ``g v / |v|`` was made, with a norm for each index along one axis."""
    v, g, norms = (saved(node, name) for name in ("v", "g", "norms"))
    others = [axis for axis in range(v.dim()) if axis != saved(node, "axis") % v.dim()]
    along = (grad * v).sum(others, keepdim=True) / norms
    return [g / norms * (grad - v * along / norms), along]


# Kinds of nodes that call a kernel of their own, and what it computes, in operations that have rules.
_FORMULAS = {"WeightNormInterfaceBackward0": (_weight_norm, ("v", "g", "norms", "axis"))}


def take_many(nodes: Iterable[Node]) -> bool:
    """Whether all of these nodes can be called with the gradients of many samples at once.

    Modes of the user's, which see every operation, are not to see those of ``vmap``, and gradients that are differentiated
    again take the way that torch takes.
    """
    if active_modes() or torch.is_grad_enabled():
        return False
    return all(_is_known(node.name()) and is_plain(node) for node in nodes)


@cache
def _is_known(kind: str) -> bool:
    return kind in AT_ONCE or (kind in _FORMULAS and knows(kind, *_FORMULAS[kind][1]))


def called_with_many(node: Node, grads: Gradients) -> list[Tensor | None]:
    """The gradients of a node's inputs, given those of its outputs, inside of :func:`as_one`."""
    if node.name() not in _FORMULAS:
        return node_vjp(node, grads)
    (grad,) = grads
    assert grad is not None
    return [*_FORMULAS[node.name()][0](node, grad)]


@contextmanager
def as_one(many: Tensor) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """Inside, one tensor of the shape ``many[0]`` stands for all of ``many``, and so does whatever is computed from it.

    Yields:
        That tensor, and the function from what was computed to ``[len(many), *its shape]``.
    """
    n = len(many)
    level = _functorch._vmap_increment_nesting(n, "error")
    try:
        yield _functorch._add_batch_dim(many, 0, level), partial(_apart, level, n)
    finally:
        _functorch._vmap_decrement_nesting()


def _apart(level: int, n: int, one: Tensor) -> Tensor:
    found: Tensor = _functorch._remove_batch_dim(one, level, n, 0)
    return found
