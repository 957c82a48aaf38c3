"""One sample by plain autograd: what self-verification compares with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_secorder.engine import own_pass, probe
from torch_secorder.errors import LifecycleError, VerificationError
from torch_secorder.per_sample import row_squares, widened
from torch_secorder.sharding import is_spread, whole
from torch_secorder.trees import mapped, rows, sample_axis, shrunk, tensors


def norms_of_first(loss: Tensor, outputs: Sequence[Tensor], parameters: Sequence[Tensor], axis: int) -> Tensor:
    """``||g||^2`` of each parameter for the first sample of a loss, through the graph of its outputs, which is kept."""
    with torch.enable_grad(), probe([loss]) as (root,):
        seeds = torch.autograd.grad(root, list(outputs), retain_graph=True, allow_unused=True)
    pairs = [(x, seed) for x, seed in zip(outputs, seeds, strict=True) if seed is not None and x.dim() > axis]
    if not pairs:
        raise LifecycleError("verify: the loss doesn't depend on the outputs of the model's latest call in this block")
    alone = [torch.zeros_like(seed) for _, seed in pairs]
    for mine, (_, seed) in zip(alone, pairs, strict=True):
        mine.select(axis, 0).copy_(seed.select(axis, 0))
    with torch.enable_grad(), probe([x for x, _ in pairs]) as roots:
        found = torch.autograd.grad(roots, list(parameters), alone, retain_graph=True, allow_unused=True)
    return squares(found)


def squares_of(root: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """``||gradient of root||^2`` of each parameter, in float64, of which there is never more than one gradient at once."""
    norms = torch.zeros(len(parameters), dtype=torch.float64)

    def arrived(position: int, grad: Tensor) -> Tensor | None:
        norms[position] = squares([grad])[0]
        # What is handed on instead takes no memory.
        return None if grad.is_sparse or is_spread(grad) else grad.new_zeros(()).expand_as(grad)

    with ExitStack() as hooks:
        for position, p in enumerate(parameters):
            hooks.callback(p.register_hook(partial(arrived, position)).remove)
        with own_pass([root]) as (start,):
            torch.autograd.grad(start, list(parameters), allow_unused=True)
    return norms


def squares(gradients: Sequence[Tensor | None]) -> Tensor:
    """``||g||^2`` of each parameter, in float64; zero for one without a gradient."""
    zero = torch.zeros((), dtype=torch.float64)
    values = (g if g is None or not g.is_sparse else g.coalesce().values() for g in map(whole, gradients))
    return torch.stack(
        [zero if g is None else row_squares(widened(g.detach().flatten())).double().cpu() for g in values]
    )


def check_separable(loss_fn: Callable[[Any, Any], Tensor], outputs: Any, targets: Any, n: int, axis: int = 0) -> None:
    """Raise if the loss's gradient in one sample's outputs depends on other samples' outputs, tried on three samples."""
    few = min(n, 3)
    outputs, targets = (rows(value, list(range(few)), n, axis) for value in (outputs, targets))
    first = _gradients_in_first(loss_fn, outputs, outputs, targets, few, axis)
    second = _gradients_in_first(loss_fn, mapped(shrunk, outputs), outputs, targets, few, axis)
    for here, there in zip(first, second, strict=True):
        if (here - there).norm() > 1e-3 * here.norm():
            raise VerificationError(
                "the loss's gradient in the first sample's outputs changes with the other samples' outputs: a loss that "
                "compares samples with each other (contrastive, load balancing, batch statistics) has no per-sample gradients"
            )


def _gradients_in_first(
    loss_fn: Callable[[Any, Any], Tensor], rest: Any, outputs: Any, targets: Any, n: int, axis: int
) -> list[Tensor]:
    """The loss's gradient in the first sample of ``outputs``, with the other samples of ``rest``."""
    leaves: list[tuple[Tensor, int]] = []
    originals = tensors(outputs)

    def leaf(x: Tensor) -> Tensor:
        original = next(originals)
        where = sample_axis(x, n, axis)
        if where is None or not x.is_floating_point():
            return original
        x = x.detach().clone()
        x.select(where, 0).copy_(original.select(where, 0))
        leaves.append((x.requires_grad_(), where))
        return x

    with torch.enable_grad():
        loss = loss_fn(mapped(leaf, rest), targets)
        found = torch.autograd.grad(loss, [x for x, _ in leaves], allow_unused=True)
    return [g.select(w, 0).double() for g, (_, w) in zip(found, leaves, strict=True) if g is not None]


def compare(names: list[str], batched: Tensor, alone: Tensor, half: bool = False, noise: Tensor | float = 0.0) -> None:
    """Raise if a sample's squared norms differ by more than rounding, which is coarse in half precision, and by ``noise``."""
    # Looser than rounding allows and tighter than any mistake of principle, which is off by per cents.
    rtol, atol = (5e-2, 1e-3) if half else (1e-6, 1e-12) if batched.dtype == torch.float64 else (1e-3, 1e-7)
    batched = batched.double().cpu()
    tolerance = rtol * torch.maximum(batched, alone) + atol * alone.sum() + noise
    wrong = ((batched - alone).abs() > tolerance).nonzero().flatten().tolist()
    if wrong:
        lines = [f"{names[i]}: {batched[i]:.6g} in its batch, {alone[i]:.6g} alone" for i in wrong[:8]]
        more = f"\n  and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise VerificationError(
            "the first sample's squared gradient norms differ from those that plain autograd gives for that sample alone:\n  "
            + "\n  ".join(lines)
            + more
            + "\neither samples influence each other (batch statistics, a loss that compares samples), or the loss depends on "
            "parameters outside of the model's outputs (a weight penalty), or the batch is not on the axis assumed "
            "(batch_axis=), or a rule is wrong; verify=False returns the numbers unchecked"
        )
