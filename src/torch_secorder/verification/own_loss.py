"""A loss that the model computes itself: one sample alone is compared with the analysis of its batch.

The outputs that this loss depends on have no row for each sample, so a sample's outputs cannot be put among the batch's. Instead,
the loss of the sample alone is differentiated. It is the sample's share of the batch's loss, up to a factor if the loss averages
over something that samples have different numbers of, such as tokens: with w_n of them in sample n, the batch's loss is
``sum_n w_n l_n / sum_n w_n``. The factor is the same for all parameters, and the factors of some samples must explain the loss of
these samples together, whatever the parameters are. In addition, that loss must have no second derivatives between samples; the
graph between the model's other outputs and the loss shows them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_secorder.autograd.product_bits import DOUBLE
from torch_secorder.batch_axis.samples import BatchSamples
from torch_secorder.model.containers import tensors
from torch_secorder.model.parameters import ParameterTable
from torch_secorder.running.analysis import Analysis
from torch_secorder.running.analyzed import Batch
from torch_secorder.running.loss_calls import loss_value
from torch_secorder.running.trials import LossFunction
from torch_secorder.verification.differentiable_model import DifferentiableModel
from torch_secorder.verification.losses_together import STEPS, require_explained
from torch_secorder.verification.samples_alone import SampleAlone
from torch_secorder.verification.separable_graph import require_separable_graph

# If a batch's outputs have at most this many numbers, all samples are checked for second derivatives, which takes about thirty
# times the memory of the outputs; otherwise only the samples that run alone are.
CHEAP = 2**20


def verify_own_loss(
    analysis: Analysis, model: DifferentiableModel, loss: OwnLoss, batch: Batch, samples: Sequence[int], *, mean: bool
) -> None:
    """Raise unless these samples have the squared norms of the batch's analysis, up to factors that explain their loss together.

    Args:
        analysis: the analysis to verify.
        model: the model.
        loss: the loss that it computes.
        batch: the result of the analysis.
        samples: the numbers of the samples to check.
        mean: whether the batch's loss is the mean over its samples; otherwise it is the sum.

    Raises:
        VerificationError: if not, naming the parameters that differ, with both numbers; or if the loss compares samples.
    """
    alone = [_LossAlone(analysis, model, loss, batch, sample, mean) for sample in samples]
    for one in alone:
        one.verify()
    with torch.enable_grad(), analysis.differentiable():
        is_cheap = sum(x.numel() for x in tensors(batch.outputs)) <= CHEAP
        loss.require_separable(model, range(loss.where.n) if is_cheap else samples, analysis.table)
        _require_explained(model, loss, alone, mean, analysis.table)


@dataclass(frozen=True)
class OwnLoss:
    """The loss that a model computes for some samples of a batch.

    Attributes:
        loss_fn: from ``(outputs, targets)`` to the loss.
        inputs: the batch.
        targets: the batch's targets.
        where: where inputs and targets have their samples.
    """

    loss_fn: LossFunction
    inputs: Any
    targets: Any
    where: BatchSamples

    def __call__(self, model: DifferentiableModel, samples: Sequence[int]) -> Tensor:
        """The loss of these samples."""
        with model.unchanged():
            return self.of_outputs(samples, model(self.where.rows("inputs", self.inputs, samples)))

    def of_outputs(self, samples: Sequence[int], outputs: Any) -> Tensor:
        """The loss that is in these samples' outputs."""
        return loss_value(self.loss_fn, outputs, self.where.rows("targets", self.targets, samples))

    def require_separable(self, model: DifferentiableModel, samples: Sequence[int], table: ParameterTable) -> None:
        """Raise if the graph between the outputs that have rows and the loss of these samples compares them."""
        if len(samples) < 2:
            return
        where = self.where.subset(samples)
        with model.unchanged(), table.ranks.fail_together():
            outputs = model(self.where.rows("inputs", self.inputs, samples))
            loss = self.of_outputs(samples, outputs)
            placed = zip(tensors(outputs), where.placements("outputs", outputs), strict=True)
            rows = [(x, placement) for x, placement in placed if placement is not None and x.requires_grad]
            if rows and loss.requires_grad:
                require_separable_graph(loss, [x for x, _ in rows], [placement for _, placement in rows], where.n)


class _LossAlone(SampleAlone):
    """One sample of a batch, and the loss that the model computes for it alone.

    Attributes:
        sample: the sample's number.
        weight: how much the sample counts in its batch, relative to the mean of all samples; 1 under "sum". It is None for a
            sample without a gradient, which does not show it.
        bits: the precision of the products that its gradients are sums of.
    """

    def __init__(
        self, analysis: Analysis, model: DifferentiableModel, loss: OwnLoss, batch: Batch, sample: int, mean: bool
    ):
        super().__init__(analysis, model, partial(_noted, self, loss), loss.inputs, batch, sample)
        self.sample, self.weight, self.bits = sample, None if mean else 1.0, DOUBLE
        self._mean, self.loss = mean, math.nan

    def verify(self) -> None:
        """Raise unless the sample has the same squared norms alone as in its batch, up to one factor under "mean"."""
        alone, bits = self.squared_norms_of(self.loss_of_outputs)
        self.bits = bits()
        in_batch = self.norms_in_batch.cpu().double()
        counts = bool(in_batch.any())
        if not counts and not math.isfinite(self.loss):
            # The sample has no label, and an average over no labels is not a number.
            self.weight, alone = None, in_batch
        elif self._mean and counts and float(alone.sum()) > 0:
            self.weight = math.sqrt(float(in_batch.sum() / alone.sum()))
        self.require_equal(alone if self.weight is None else alone * self.weight**2, self.bits)


def _noted(sample: _LossAlone, loss: OwnLoss, outputs: Any) -> Tensor:
    """The loss of a sample's own outputs; its value is noted in ``sample``."""
    found = loss.of_outputs([sample.sample], outputs)
    sample.loss = float(found.detach())
    return found


def _require_explained(
    model: DifferentiableModel, loss: OwnLoss, alone: Sequence[_LossAlone], mean: bool, table: ParameterTable
) -> None:
    """Raise unless the loss of the samples whose weights are known is the weighted sum of their losses alone.

    Ranks that hold the model together check this only at the model's own parameters, and either all of them do or none.
    """
    weights = {one.sample: one.weight for one in alone if one.weight is not None}
    together = bool(table.sharded) or table.ranks.distributed
    if table.ranks.max_over_ranks(len(weights) < 2) or (
        together and table.ranks.max_over_ranks(len(weights) < len(alone))
    ):
        return
    divisor = sum(weights.values()) if mean else 1.0
    shares = {sample: weight / divisor for sample, weight in weights.items()}
    elsewhere = [] if together else [partial(model.elsewhere, step, seed) for step, seed in STEPS]
    with table.ranks.fail_together():
        require_explained([*elsewhere, lambda: model], loss, shares, min(one.bits for one in alone))
