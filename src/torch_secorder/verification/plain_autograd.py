"""One sample by plain autograd: what self-verification compares with."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from torch_secorder.autograd.engine import library_pass, search_pass
from torch_secorder.errors import LifecycleError, VerificationError
from torch_secorder.model.ranks import full_tensor, is_dtensor
from torch_secorder.per_sample import at_least_float32, squared_norm_of_rows


def squared_norms_of_first(loss: Tensor, outputs: Sequence[Tensor], parameters: Sequence[Tensor], axis: int) -> Tensor:
    """``||g||^2`` of each parameter for the first sample of a loss, through the graph of its outputs, which is kept."""
    with torch.enable_grad(), search_pass([loss]) as (root,):
        seeds = torch.autograd.grad(root, list(outputs), retain_graph=True, allow_unused=True)
    pairs = [(x, seed) for x, seed in zip(outputs, seeds, strict=True) if seed is not None and x.dim() > axis]
    if not pairs:
        raise LifecycleError("verify: the loss doesn't depend on the outputs of the model's latest call in this block")
    alone = [torch.zeros_like(seed) for _, seed in pairs]
    for mine, (_, seed) in zip(alone, pairs, strict=True):
        mine.select(axis, 0).copy_(seed.select(axis, 0))
    with torch.enable_grad(), search_pass([x for x, _ in pairs]) as roots:
        found = torch.autograd.grad(roots, list(parameters), alone, retain_graph=True, allow_unused=True)
    return squares(found)


def squared_norms_of_loss(root: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """``||gradient of root||^2`` of each parameter, in float64, of which there is never more than one gradient at once."""
    norms = torch.zeros(len(parameters), dtype=torch.float64)

    def arrived(position: int, grad: Tensor) -> Tensor | None:
        norms[position] = squares([grad])[0]
        # What is handed on instead takes no memory.
        return None if grad.is_sparse or is_dtensor(grad) else grad.new_zeros(()).expand_as(grad)

    with ExitStack() as hooks:
        for position, p in enumerate(parameters):
            hooks.callback(p.register_hook(partial(arrived, position)).remove)
        with library_pass([root]) as (start,):
            torch.autograd.grad(start, list(parameters), allow_unused=True)
    return norms


def squares(gradients: Sequence[Tensor | None]) -> Tensor:
    """``||g||^2`` of each parameter, in float64; zero for one without a gradient."""
    zero = torch.zeros((), dtype=torch.float64)
    values = (g if g is None or not g.is_sparse else g.coalesce().values() for g in map(full_tensor, gradients))
    return torch.stack(
        [
            zero if g is None else squared_norm_of_rows(at_least_float32(g.detach().flatten())).double().cpu()
            for g in values
        ]
    )


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
