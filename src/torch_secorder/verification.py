"""Self-verification: one sample alone, through plain autograd, against what its batch's analysis says of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torch_secorder.analysis import Analysis
from torch_secorder.capture import tensors
from torch_secorder.errors import VerificationError
from torch_secorder.passes import Samples
from torch_secorder.run import called, mapped, rows, shrunk, undisturbed


def verified(
    analysis: Analysis, loss: Callable[[Any], Tensor], inputs: Any, samples: Samples | None = None, sample: int = 0
) -> None:
    """Raise unless one sample of a batch has the squared norms that the batch's analysis says.

    The sample runs through the model alone; its output takes its row in the batch's outputs, which are constants, and
    the loss of that is differentiated by plain autograd. It costs a plain forward of the batch and a step of one sample.
    A model that draws random numbers is compared in eval mode, which stops dropout.

    Args:
        analysis: what is verified.
        loss: from the model's outputs to a sum over samples.
        inputs: a batch.
        samples: what the analysis says of that batch, if that is known already.
        sample: which row.

    Raises:
        VerificationError: naming the parameters that differ, with both numbers.
    """
    model = analysis.model
    cuda = [p.device for p in analysis.table.tensors if p.is_cuda][:1]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        stack.enter_context(undisturbed(model))
        if _is_random(model, inputs):
            stack.enter_context(_eval_mode(model))
            if _is_random(model, inputs):
                warnings.warn("not verified: the model draws random numbers in eval mode too", stacklevel=3)
                return
            samples = None
        samples = samples or analysis.of(loss, inputs)
        found = _squared_norms(analysis, loss, inputs, sample, samples.batch)
    _compare(analysis.table.names, samples.norms[:, sample].detach(), found)


def _squared_norms(analysis: Analysis, loss: Callable[[Any], Tensor], inputs: Any, sample: int, n: int) -> Tensor:
    """``||g||^2`` of each parameter for one sample of a batch."""
    with torch.no_grad():
        batch = called(analysis.model, inputs)
    _check_separable(loss, batch, sample, n)
    with torch.enable_grad(), analysis.differentiable():
        own = tensors(called(analysis.model, rows(inputs, [sample], n)))

        def inserted(rest: Tensor) -> Tensor:
            mine = next(own)
            if not (rest.dim() and rest.shape[0] == n and mine.shape[:1] == (1,) and rest.shape[1:] == mine.shape[1:]):
                return mine if mine.shape == rest.shape else rest
            return torch.cat([rest[:sample], mine, rest[sample + 1 :]])

        found = torch.autograd.grad(loss(mapped(inserted, batch)), analysis.table.tensors, allow_unused=True)
    norms = [torch.zeros(()) if g is None else g.detach().double().square().sum().cpu() for g in found]
    return torch.stack([norm.double() for norm in norms])


def _check_separable(loss: Callable[[Any], Tensor], batch: Any, sample: int, n: int) -> None:
    """Raise if the loss's gradient in one sample's outputs depends on other samples' outputs."""
    gradients = []
    for outputs in (batch, mapped(shrunk, batch)):
        leaves: list[Tensor] = []
        originals = tensors(batch)

        def leaf(x: Tensor, originals: Iterator[Tensor] = originals, leaves: list[Tensor] = leaves) -> Tensor:
            original = next(originals)
            if not (x.is_floating_point() and x.dim() and len(x) == n):
                return original
            x = x.detach().clone()
            x[sample] = original[sample]
            leaves.append(x.requires_grad_())
            return x

        with torch.enable_grad():
            found = torch.autograd.grad(loss(mapped(leaf, outputs)), leaves, allow_unused=True)
        gradients.append([torch.zeros(()) if g is None else g[sample].double() for g in found])
    for here, there in zip(*gradients, strict=True):
        if (here - there).norm() > 1e-3 * here.norm():
            raise VerificationError(
                "the loss's gradient in the first sample's outputs changes with the other samples' outputs: a loss that "
                "compares samples with each other (contrastive, load balancing, batch statistics) has no per-sample "
                "gradients; verify=False returns N times the gradient of each sample's outputs instead"
            )


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


def _is_random(model: nn.Module, inputs: Any) -> bool:
    """Whether a forward draws from the global random state."""
    before = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]
    with torch.no_grad():
        called(model, inputs)
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
