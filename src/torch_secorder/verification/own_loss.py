"""A loss that the model computes itself, for one sample alone, against what the analysis of its batch says of the sample.

No output has a row for each sample that this loss depends on, so that a sample's outputs can't be put among the batch's. What is
differentiated is the loss of the sample alone. It is the sample's share in the batch's loss, but for a factor where the loss is
an average over something that samples have different numbers of, such as tokens: with w_n of them in sample n, the batch's
loss is ``sum_n w_n l_n / sum_n w_n``. The factor is one for all parameters, and the factors of some samples have to say what the
loss of these samples together is, which they don't if the loss compares samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_secorder.errors import VerificationError
from torch_secorder.running.analysis import Analysis, Batch
from torch_secorder.verification.differentiable_model import DifferentiableModel
from torch_secorder.verification.samples_alone import SampleAlone, comparable, samples_to_check
from torch_secorder.verification.tolerances import OWN_LOSS_OF_SEVERAL

LossFunction = Callable[[Any, Any], Tensor]


def verify_own_loss(
    analysis: Analysis,
    loss_fn: LossFunction,
    inputs: Any,
    targets: Any,
    batch: Batch,
    samples: Sequence[int] | None = None,
) -> None:
    """Raise unless these samples have the squared norms that the batch's analysis says, up to a factor that explains itself.

    Args:
        analysis: what is verified.
        loss_fn: from ``(outputs, targets)`` to the batch's loss, which the model has computed.
        inputs: the batch.
        targets: the batch's.
        batch: what the analysis says of it.
        samples: the numbers of the samples to look at; by default the first, the last and one at random.

    Raises:
        VerificationError: if not, naming the parameters that differ, with both numbers.
    """
    n, mean = batch.where.n, batch.reduction == "mean"
    scale = n if mean else 1
    chosen = list(samples_to_check(n, analysis.table.ranks) if samples is None else samples)
    with comparable(analysis, lambda outputs: loss_fn(outputs, targets) * scale, inputs, batch, chosen[0]) as found:
        if found is None:
            return
        plain, model = found
        alone = [_LossAlone(analysis, model, loss_fn, targets, inputs, plain, sample, mean) for sample in chosen]
        for one in alone:
            one.verify()
        where = batch.where
        parts = where.rows("inputs", inputs, chosen), where.rows("targets", targets, chosen)
        _require_explained(alone, _together(model, loss_fn, *parts), mean, alone[0].tolerance)


class _LossAlone(SampleAlone):
    """One sample of a batch, and the loss that the model computes for it alone.

    Attributes:
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
        self._mean = mean
        self.weight, self.loss, self.tolerance = 1.0, math.nan, 0.0

    def verify(self) -> None:
        """Raise unless the sample has the same squared norms alone as in its batch, up to one factor under "mean"."""
        alone, bits = self.squared_norms_of(self.loss_of_outputs)
        self.tolerance = OWN_LOSS_OF_SEVERAL[bits]
        in_batch = self.norms_in_batch.cpu().double()
        if not math.isfinite(self.loss) and not bool(in_batch.any()):
            self.weight, alone = 0.0, torch.zeros_like(alone)  # It has no label: an average over none is not a number.
        elif self._mean and float(alone.sum()) > 0:
            self.weight = math.sqrt(float(in_batch.sum() / alone.sum()))
        self.require_equal(alone * self.weight**2, bits)


def _noted(sample: _LossAlone, loss_fn: LossFunction, targets: Any, outputs: Any) -> Tensor:
    """The loss of a sample's own outputs, of which a note is kept."""
    loss = loss_fn(outputs, targets)
    sample.loss = float(loss.detach())
    return loss


def _together(model: DifferentiableModel, loss_fn: LossFunction, inputs: Any, targets: Any) -> float:
    with torch.enable_grad():
        return float(loss_fn(model(inputs), targets).detach())


def _require_explained(alone: Sequence[_LossAlone], together: float, mean: bool, tolerance: float) -> None:
    """Raise unless the loss of these samples together is made of their losses alone, by their weights."""
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
