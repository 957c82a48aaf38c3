"""Whether the gradients of the user's loss were taken apart as they are: samples alone, and a loss that doesn't compare them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from torch_secorder.running.analysis import Analysis, Batch
from torch_secorder.verification.own_loss import verify_own_loss
from torch_secorder.verification.samples_alone import on_samples_alone, verify_samples
from torch_secorder.verification.separable_loss import require_separable


def verify_empirical(
    analysis: Analysis,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    batch: Batch,
    samples: Sequence[int] | None = None,
) -> None:
    """Raise unless the loss takes samples apart, and these samples have the squared norms that the batch's analysis says.

    Args:
        analysis: what is verified.
        loss_fn: from ``(outputs, targets)`` to the batch's loss.
        inputs: the batch.
        targets: the batch's.
        batch: what the analysis says of it.
        samples: the numbers of the samples to look at; by default the first, the last and one at random.

    Raises:
        VerificationError: if not, naming the parameters that differ, with both numbers.
    """
    if batch.loss_inside:
        verify_own_loss(analysis, loss_fn, inputs, targets, batch, samples)
        return
    with on_samples_alone():
        require_separable(loss_fn, batch.outputs, targets, batch.where)
    scale = batch.where.n if batch.reduction == "mean" else 1
    verify_samples(analysis, lambda outputs: loss_fn(outputs, targets) * scale, inputs, batch, samples)
