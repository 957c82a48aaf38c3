"""Self-verification: one sample alone, through plain autograd, against what its batch's analysis says of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torch_secorder.analysis import Analysis
from torch_secorder.capture import tensors
from torch_secorder.errors import VerificationError
from torch_secorder.passes import Samples
from torch_secorder.run import called, mapped, rows, undisturbed


def verified(
    analysis: Analysis,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    samples: Samples,
    reduction: str,
    sample: int = 0,
) -> None:
    """Raise unless one sample of a batch has the squared norms that the batch's analysis says.

    The sample runs through the model alone; its output takes its row in the batch's outputs, which are constants, and the batch's
    loss (times N if it averages) is differentiated by plain autograd. It costs one plain forward of the batch and a step
    of one sample. A model that draws random numbers is compared in eval mode, which stops dropout.

    Raises:
        VerificationError: naming the parameters that differ, with both numbers.
    """
    model, n = analysis.model, samples.batch
    cuda = [p.device for p in analysis.table.tensors if p.is_cuda][:1]
    with torch.random.fork_rng(devices=cuda), undisturbed(model):
        alone = _inputs_of(inputs, sample, n)
        if _is_random(model, alone):
            with _eval_mode(model):
                if _is_random(model, alone):
                    warnings.warn("not verified: the model draws random numbers in eval mode too", stacklevel=3)
                    return
                samples, _ = analysis.empirical(loss_fn, inputs, targets)
                found = _squared_norms(analysis, loss_fn, inputs, targets, sample, n, reduction)
        else:
            found = _squared_norms(analysis, loss_fn, inputs, targets, sample, n, reduction)
    _compare(analysis.table.names, samples.norms[:, sample].detach(), found)


def _squared_norms(
    analysis: Analysis,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    sample: int,
    n: int,
    reduction: str,
) -> Tensor:
    """``||g||^2`` of each parameter for one sample of a batch."""
    with torch.no_grad():
        batch = called(analysis.model, inputs)
    with torch.enable_grad(), analysis.differentiable():
        alone = list(tensors(called(analysis.model, _inputs_of(inputs, sample, n))))
        own = iter(alone)

        def inserted(rest: Tensor) -> Tensor:
            mine = next(own)
            if not (rest.dim() and rest.shape[0] == n and mine.shape[:1] == (1,) and rest.shape[1:] == mine.shape[1:]):
                return mine if mine.shape == rest.shape else rest
            return torch.cat([rest[:sample], mine, rest[sample + 1 :]])

        loss = loss_fn(mapped(inserted, batch), targets) * (n if reduction == "mean" else 1)
        found = torch.autograd.grad(loss, analysis.table.tensors, allow_unused=True)
    norms = [torch.zeros(()) if g is None else g.detach().to(torch.float64).square().sum().cpu() for g in found]
    return torch.stack([norm.double() for norm in norms])


def _compare(names: list[str], batched: Tensor, alone: Tensor) -> None:
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


def _inputs_of(inputs: Any, sample: int, n: int) -> Any:
    return rows(inputs, [sample], n)


def _is_random(model: nn.Module, alone: Any) -> bool:
    """Whether a forward draws from the global random state."""
    before = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]
    with torch.no_grad():
        called(model, alone)
    after = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]
    return not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
