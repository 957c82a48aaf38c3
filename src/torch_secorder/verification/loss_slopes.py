"""The gradient of a loss in a model's outputs, and losses that are made of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_secorder.graph.queries import LossGraph
from torch_secorder.model.containers import is_continuous, mapped, tensors
from torch_secorder.running.analysis import Analysis

Loss = Callable[[Any], Tensor]  # from the model's outputs to a sum over samples


@dataclass(frozen=True)
class LossSlopes:
    """What a loss was differentiated to.

    Attributes:
        gradients: its gradient in the batch's outputs, in the same containers.
        loss: the loss, whose graph tells the precision of the gradients.
    """

    gradients: Any
    loss: Tensor


def loss_slopes(analysis: Analysis, loss: Loss, outputs: Any) -> LossSlopes | None:
    """The gradient of a loss in the outputs; None if the loss depends on parameters by another way.

    Sharded and nested outputs are not differentiated here either, since products with them are tensors of other kinds.
    """
    if any(type(x) is not Tensor or x.is_nested for x in tensors(outputs)):
        return None
    with torch.enable_grad(), analysis.differentiable():
        leaves = _leaves(outputs)
        root = loss(leaves)
        if not root.requires_grad or LossGraph(root, ()).parameters(analysis.table):
            return None
        found = iter(_gradients_in(root, leaves))
    return LossSlopes(mapped(lambda x: torch.zeros_like(x) if (g := next(found)) is None else g, outputs), root)


def loss_gradients(loss: Loss, outputs: Any) -> list[Tensor | None]:
    """The gradients of a loss in each tensor that it is computed from."""
    with torch.enable_grad():
        leaves = _leaves(outputs)
        return _gradients_in(loss(leaves), leaves)


def _leaves(outputs: Any) -> Any:
    """The same outputs as leaves of a graph of their own."""
    return mapped(lambda x: x.clone().requires_grad_(is_continuous(x)), outputs)


def _gradients_in(root: Tensor, leaves: Any) -> list[Tensor | None]:
    """The gradient in each leaf; None if there is none."""
    wanted = [x for x in tensors(leaves) if x.requires_grad]
    found = iter(torch.autograd.grad(root, wanted, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in tensors(leaves)]


def multiple(factor: float, loss: Loss, outputs: Any) -> Tensor:
    """A loss times a number."""
    return factor * loss(outputs)


def inner_product(gradients: Sequence[Tensor | None], outputs: Any) -> Tensor:
    """``sum of outputs times gradients``; its gradients in the outputs are the given ones."""
    pairs = zip(tensors(outputs), gradients, strict=True)
    found = [(x * g.conj()).real.sum() for x, g in pairs if g is not None and x.requires_grad]
    return sum((value.to(found[0].device) for value in found[1:]), found[0]) if found else torch.zeros((), device="cpu")
