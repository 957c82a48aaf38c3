"""One sample by plain autograd: what self-verification compares with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_secorder.capture import probe
from torch_secorder.errors import LifecycleError, VerificationError
from torch_secorder.trees import mapped, sample_axis, shrunk, tensors


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
    return torch.stack([torch.zeros(()).double() if g is None else g.double().square().sum().cpu() for g in found])


def check_separable(loss: Callable[[Any], Tensor], batch: Any, sample: int, n: int, axis: int = 0) -> None:
    """Raise if the loss's gradient in one sample's outputs depends on other samples' outputs."""
    gradients = []
    for outputs in (batch, mapped(shrunk, batch)):
        leaves: list[Tensor] = []
        axes: list[int] = []
        originals = tensors(batch)

        def leaf(
            x: Tensor, originals: Iterator[Tensor] = originals, leaves: list[Tensor] = leaves, axes: list[int] = axes
        ) -> Tensor:
            original = next(originals)
            where = sample_axis(x, n, axis)
            if where is None or not x.is_floating_point():
                return original
            x = x.detach().clone()
            x.select(where, sample).copy_(original.select(where, sample))
            leaves.append(x.requires_grad_())
            axes.append(where)
            return x

        with torch.enable_grad():
            found = torch.autograd.grad(loss(mapped(leaf, outputs)), leaves, allow_unused=True)
        pairs = zip(found, axes, strict=True)
        gradients.append([torch.zeros(()) if g is None else g.select(where, sample).double() for g, where in pairs])
    for here, there in zip(*gradients, strict=True):
        if (here - there).norm() > 1e-3 * here.norm():
            raise VerificationError(
                "the loss's gradient in the first sample's outputs changes with the other samples' outputs: a loss that "
                "compares samples with each other (contrastive, load balancing, batch statistics) has no per-sample "
                "gradients; verify=False returns N times the gradient of each sample's outputs instead"
            )


def compare(names: list[str], batched: Tensor, alone: Tensor) -> None:
    """Raise if a sample's squared norms differ by more than rounding."""
    # Looser than rounding allows and tighter than any mistake of principle, which is off by per cents.
    half = batched.dtype != torch.float64
    batched = batched.double().cpu()
    tolerance = (1e-3 if half else 1e-6) * torch.maximum(batched, alone) + (1e-7 if half else 1e-12) * alone.sum()
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
