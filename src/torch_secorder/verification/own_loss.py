"""A loss that the model computes itself, for one sample alone, against what the analysis of its batch says of the sample.

No output has a row for each sample that this loss depends on, so that a sample's outputs can't be put among the batch's. What is
differentiated is the loss of the sample alone. It is the sample's share in the batch's loss, but for a factor where the loss is
an average over something that samples have different numbers of, such as tokens: with w_n of them in sample n, the batch's
loss is ``sum_n w_n l_n / sum_n w_n``. The factor is one for all parameters, and the factors of some samples have to say what the
loss of these samples together is, which they don't if the loss compares samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_secorder.errors import VerificationError
from torch_secorder.running.analysis import Analysis, Batch
from torch_secorder.running.loss import LossFunction
from torch_secorder.verification.differentiable_model import DifferentiableModel
from torch_secorder.verification.samples_alone import SampleAlone
from torch_secorder.verification.tolerances import own_loss_of_several


class LossAlone(SampleAlone):
    """One sample of a batch, and the loss that the model computes for it alone.

    Attributes:
        loss_fn: from ``(outputs, targets)`` to the loss, which the model has computed.
        is_mean: whether the batch's loss is the mean over its samples, or the sum.
        weight: how much the batch counts the sample beside others, in units of its mean count; 1 under "sum".
        loss: the sample's loss alone.
        tolerance: how far the loss of several samples may be from what the weights say.
    """

    def __init__(
        self,
        analysis: Analysis,
        model: DifferentiableModel,
        loss_fn: LossFunction,
        targets: Any,
        inputs: Any,
        batch: Batch,
        sample: int,
        mean: bool,
    ):
        own = batch.where.rows("targets", targets, [sample])
        super().__init__(analysis, model, partial(_noted, self, loss_fn, own), inputs, batch, sample)
        self.loss_fn, self.is_mean = loss_fn, mean
        self.weight, self.loss, self.tolerance = 1.0, math.nan, 0.0

    def verify(self) -> None:
        """Raise unless the sample has the same squared norms alone as in its batch, up to one factor under "mean"."""
        alone, half = self.squared_norms_of(self.loss_of_outputs)
        self.tolerance = own_loss_of_several(half)
        in_batch = self.norms_in_batch.cpu().double()
        if not math.isfinite(self.loss) and not bool(in_batch.any()):
            self.weight, alone = 0.0, torch.zeros_like(alone)  # It has no label: an average over none is not a number.
        elif self.is_mean and float(alone.sum()) > 0:
            self.weight = math.sqrt(float(in_batch.sum() / alone.sum()))
        self.require_equal(alone * self.weight**2, half)


def _noted(sample: LossAlone, loss_fn: LossFunction, targets: Any, outputs: Any) -> Tensor:
    """The loss of a sample's own outputs, of which a note is kept."""
    loss = loss_fn(outputs, targets)
    sample.loss = float(loss.detach())
    return loss


def require_explained(alone: Sequence[LossAlone], model: DifferentiableModel, inputs: Any, targets: Any) -> None:
    """Raise unless the loss of these samples together is made of their losses alone, by their weights.

    Args:
        alone: the samples, each of which was verified alone.
        model: the model.
        inputs: those of these samples, together.
        targets: the same.

    Raises:
        VerificationError: if not, with both numbers.
    """
    first = alone[0]
    with torch.enable_grad():
        together = float(first.loss_fn(model(inputs), targets).detach())
    mean, tolerance = first.is_mean, first.tolerance
    counted = [one for one in alone if one.weight]
    if not counted:
        return
    divisor = sum(one.weight for one in counted) if mean else 1.0
    expected = sum(one.weight * one.loss for one in counted) / divisor
    size = sum(abs(one.weight * one.loss) for one in counted) / divisor
    if not abs(together - expected) <= tolerance * size:
        raise VerificationError(
            f"the loss that the model computes is {together:.6g} for {len(alone)} samples together, and their losses alone make "
            f"{expected:.6g}: a loss that compares samples with each other (contrastive, load balancing, a root or a "
            "logarithm of a mean) has no per-sample gradients"
        )
