"""Checks of an analysis of the user's loss: samples alone, and whether the loss compares samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torch_secorder.running.analysis import Analysis
from torch_secorder.running.analyzed import Batch
from torch_secorder.running.loss_calls import loss_value
from torch_secorder.running.trials import LossFunction
from torch_secorder.verification.own_loss import OwnLoss, verify_own_loss
from torch_secorder.verification.samples_alone import comparable, on_samples_alone, samples_to_check, verify_samples
from torch_secorder.verification.separable_loss import require_separable


def verify_empirical(
    analysis: Analysis,
    loss_fn: LossFunction,
    inputs: Any,
    targets: Any,
    batch: Batch,
    samples: Sequence[int] | None = None,
) -> None:
    """Raise unless the loss is separable by samples and these samples have the squared norms of the batch's analysis.

    Args:
        analysis: the analysis to verify.
        loss_fn: from ``(outputs, targets)`` to the batch's loss.
        inputs: the batch.
        targets: the batch's targets.
        batch: the result of the analysis.
        samples: the numbers of the samples to check; by default the first, the last and one at random.

    Raises:
        VerificationError: if not, naming the parameters that differ, with both numbers; or if the loss compares samples.
    """
    mean = batch.reduction == "mean"
    scale = batch.where.n if mean else 1

    def loss(outputs: Any) -> Tensor:
        """The sum of the samples' losses."""
        return loss_value(loss_fn, outputs, targets) * scale

    if not batch.loss_inside:
        with on_samples_alone(analysis):
            require_separable(loss_fn, batch.outputs, targets, batch.where)
        verify_samples(analysis, loss, inputs, batch, samples)
        return
    where = batch.where
    chosen = list(samples_to_check(where.n, analysis.table.ranks) if samples is None else samples)
    with comparable(analysis, loss, inputs, batch, chosen[0]) as found:
        if found is not None:
            plain, model = found
            verify_own_loss(analysis, model, OwnLoss(loss_fn, inputs, targets, where), plain, chosen, mean=mean)
