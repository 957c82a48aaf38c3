"""Self-verification: one sample alone, through plain autograd, against what its batch's analysis says of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_secorder.autograd.engine import call_model
from torch_secorder.errors import VerificationError
from torch_secorder.model.containers import mapped, rows, sample_axis, tensors
from torch_secorder.model.restore import eval_mode, forked_random, restoring_buffers
from torch_secorder.recording.accumulator import HALF
from torch_secorder.running.analysis import Analysis, Batch
from torch_secorder.verification.plain_autograd import compare, squared_norms_of_loss

ROUNDING = 100  # times the relative distance of two numbers


def verified(
    analysis: Analysis, loss: Callable[[Any], Tensor], inputs: Any, batch: Batch, *, by_autograd: bool = True
) -> None:
    """Raise unless a batch's first sample has the squared norms that the batch's analysis says.

    The sample runs through the model alone; its output takes its row in the batch's outputs, which are constants, and
    the loss of that is differentiated: a step of one sample. Where the model draws random numbers, both are done once more
    in eval mode, which stops dropout.

    Args:
        analysis: what is verified.
        loss: from the model's outputs to a sum over samples.
        inputs: a batch.
        batch: what the analysis says of it.
        by_autograd: differentiate the sample's loss by plain autograd, which also checks the rules, unless a weight is
            quantized, so that it has no gradient there; else by the rules, which
            needs no parameter gradient and still shows a batch axis mistaken for another and samples that are coupled.

    Raises:
        VerificationError: naming the parameters that differ, with both numbers.
    """
    with ExitStack() as stack:
        stack.enter_context(forked_random(analysis.table.tensors))
        stack.enter_context(restoring_buffers(analysis.model))
        if batch.random:
            stack.enter_context(eval_mode(analysis.model))
            batch = analysis.of(loss, inputs)
            if batch.random:
                warnings.warn("not verified: the model draws random numbers in eval mode too", stacklevel=3)
                return
        n, axis = batch.samples.batch, analysis.batch_axis
        if analysis.table.ranks.max_over_ranks(n) == 1 and not by_autograd:
            return
        alone = rows(inputs, [0], n, axis)

        def among_the_rest(own: Any) -> Tensor:
            return loss(mapped(partial(_inserted, iter(tensors(own)), n, axis), batch.outputs))

        def norms_of(root: Callable[[Any], Tensor]) -> Tensor:
            if not by_autograd or analysis.table.quantized:
                return analysis.of(root, alone).samples.squared_norms[:, 0].detach().double().cpu()
            with torch.enable_grad(), analysis.differentiable():
                return squared_norms_of_loss(root(call_model(analysis.model, alone)), analysis.table.leaves)

        norms, found = norms_of(among_the_rest), batch.samples.squared_norms[:, 0].detach()
        half = torch.is_autocast_enabled() or any(
            x.dtype in HALF for x in (*analysis.table.tensors, *tensors(batch.outputs))
        )
        try:
            compare(analysis.table.names, found, norms, half)
        except VerificationError:
            # A sample alone may be rounded differently, which is all that a perfect fit leaves of its gradient.
            own = mapped(Tensor.detach, call_model(analysis.model, alone))
            off = _rounded_off(among_the_rest, own, rows(batch.outputs, [0], n, axis))
            if off is None:
                raise
            squares = norms_of(lambda outputs: _product(outputs, off))
            compare(analysis.table.names, found, norms, half, 4 * (squares + 2 * (squares * norms).sqrt()))


def _rounded_off(loss: Callable[[Any], Tensor], here: Any, there: Any) -> list[Tensor | None] | None:
    """The difference of a loss's gradients in outputs that differ by rounding; None if they differ by more than that."""
    for x, y in zip(tensors(here), tensors(there), strict=True):
        if x.shape != y.shape or x.dtype != y.dtype:
            return None
        numbers = x.is_floating_point() and x.numel() > 0
        if numbers and not (x - y).abs().max() <= ROUNDING * torch.finfo(x.dtype).eps * y.abs().max():
            return None
    pairs = zip(_gradients(loss, here), _gradients(loss, there), strict=True)
    return [None if a is None or b is None else a - b for a, b in pairs]


def _gradients(loss: Callable[[Any], Tensor], outputs: Any) -> list[Tensor | None]:
    """Those of a loss in each tensor that it is computed from."""
    with torch.enable_grad():
        leaves = mapped(lambda x: x.clone().requires_grad_(x.is_floating_point()), outputs)
        wanted = [x for x in tensors(leaves) if x.requires_grad]
        found = iter(torch.autograd.grad(loss(leaves), wanted, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in tensors(leaves)]


def _product(outputs: Any, gradients: list[Tensor | None]) -> Tensor:
    """What has these gradients in the outputs."""
    pairs = zip(tensors(outputs), gradients, strict=True)
    return sum(((x * g).sum() for x, g in pairs if g is not None and x.requires_grad), torch.zeros(()))


def _inserted(own: Iterator[Tensor], n: int, axis: int, rest: Tensor) -> Tensor:
    """One of the batch's outputs with the sample's own in its place."""
    mine = next(own)
    where = sample_axis(rest, n, axis)
    if where is None or mine.shape != rest.narrow(where, 0, 1).shape:
        return mine if mine.shape == rest.shape else rest
    return torch.cat([mine, rest.narrow(where, 1, n - 1)], where)
