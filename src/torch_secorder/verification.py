"""Self-verification: one sample alone, through plain autograd, against what its batch's analysis says of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_secorder.analysis import Analysis, Batch
from torch_secorder.run import called, fork_random, undisturbed
from torch_secorder.single import check_separable, compare
from torch_secorder.trees import mapped, rows, sample_axis, tensors


def verified(analysis: Analysis, loss: Callable[[Any], Tensor], inputs: Any, batch: Batch, sample: int = 0) -> None:
    """Raise unless one sample of a batch has the squared norms that the batch's analysis says.

    The sample runs through the model alone; its output takes its row in the batch's outputs, which are constants, and
    the loss of that is differentiated by plain autograd: a step of one sample. Where the model draws random numbers, both
    are done once more in eval mode, which stops dropout.

    Args:
        analysis: what is verified.
        loss: from the model's outputs to a sum over samples.
        inputs: a batch.
        batch: what the analysis says of it.
        sample: which row.

    Raises:
        VerificationError: naming the parameters that differ, with both numbers.
    """
    with ExitStack() as stack:
        stack.enter_context(fork_random(analysis.table.tensors))
        stack.enter_context(undisturbed(analysis.model))
        if batch.random:
            stack.enter_context(_eval_mode(analysis.model))
            batch = analysis.of(loss, inputs)
            if batch.random:
                warnings.warn("not verified: the model draws random numbers in eval mode too", stacklevel=3)
                return
        n, axis = batch.samples.batch, analysis.batch_axis
        check_separable(loss, batch.outputs, sample, n, axis)
        with torch.enable_grad(), analysis.differentiable():
            own = tensors(called(analysis.model, rows(inputs, [sample], n, axis)))
            outputs = mapped(partial(_inserted, own, sample, n, axis), batch.outputs)
            found = torch.autograd.grad(loss(outputs), analysis.table.tensors, allow_unused=True)
    norms = [torch.zeros(()) if g is None else g.detach().double().square().sum().cpu() for g in found]
    compare(
        analysis.table.names, batch.samples.norms[:, sample].detach(), torch.stack([norm.double() for norm in norms])
    )


def _inserted(own: Iterator[Tensor], sample: int, n: int, axis: int, rest: Tensor) -> Tensor:
    """One of the batch's outputs with the sample's own in its place."""
    mine = next(own)
    where = sample_axis(rest, n, axis)
    if where is None or mine.shape != rest.narrow(where, sample, 1).shape:
        return mine if mine.shape == rest.shape else rest
    return torch.cat([rest.narrow(where, 0, sample), mine, rest.narrow(where, sample + 1, n - sample - 1)], where)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
