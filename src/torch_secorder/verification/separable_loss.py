"""Whether a loss takes samples apart: otherwise there are no per-sample gradients to speak of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_secorder.errors import VerificationError
from torch_secorder.model.containers import is_continuous, mapped, rows, sample_axis, shrunk, tensors
from torch_secorder.model.nested import select
from torch_secorder.verification.tolerances import SEPARABLE_LOSS

SAMPLES = 3  # as many as it takes for a loss that compares each sample with two others


def require_separable(loss_fn: Callable[[Any, Any], Tensor], outputs: Any, targets: Any, n: int, axis: int = 0) -> None:
    """Raise if the loss's gradient in one sample's outputs depends on other samples' outputs, tried on three samples.

    Raises:
        VerificationError: if it does.
    """
    few = min(n, SAMPLES)
    outputs, targets = (rows(value, list(range(few)), n, axis) for value in (outputs, targets))
    first = _gradients_in_first(loss_fn, outputs, outputs, targets, few, axis)
    second = _gradients_in_first(loss_fn, mapped(shrunk, outputs), outputs, targets, few, axis)
    for here, there in zip(first, second, strict=True):
        off, size = float((here - there).norm()), float(here.norm())
        if not (off <= SEPARABLE_LOSS * size and math.isfinite(size)):  # What isn't finite agrees with nothing.
            raise VerificationError(
                "the loss's gradient in the first sample's outputs changes with the other samples' outputs: a loss that "
                "compares samples with each other (contrastive, load balancing, batch statistics) has no per-sample gradients"
            )


def _gradients_in_first(
    loss_fn: Callable[[Any, Any], Tensor], rest: Any, outputs: Any, targets: Any, n: int, axis: int
) -> list[Tensor]:
    """The loss's gradient in the first sample of ``outputs``, with the other samples of ``rest``."""
    leaves: list[tuple[Tensor, int]] = []
    originals = iter(tensors(outputs))

    def leaf(x: Tensor) -> Tensor:
        original = next(originals)
        where = sample_axis(x, n, axis)
        if where is None or not is_continuous(x):
            return original
        x = x.detach().clone()
        select(x, where, 0).copy_(select(original, where, 0))
        leaves.append((x.requires_grad_(), where))
        return x

    with torch.enable_grad():
        loss = loss_fn(mapped(leaf, rest), targets)
        if not leaves or not loss.requires_grad:
            raise VerificationError(
                f"the numbers can't be checked, since the loss has no gradient in any output with one row for each of {n} "
                "samples, as where a loss is computed inside the model: have the model return unreduced losses of shape (N,) or "
                "what the loss is computed from; fisher_report(..., verify=False) returns the numbers unchecked"
            )
        found = torch.autograd.grad(loss, [x for x, _ in leaves], allow_unused=True)
    return [_in_float64(select(g, w, 0)) for g, (_, w) in zip(found, leaves, strict=True) if g is not None]


def _in_float64(grad: Tensor) -> Tensor:
    """A gradient as real numbers of double precision."""
    return (torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad).double()
