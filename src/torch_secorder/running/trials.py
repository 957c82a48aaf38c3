"""Trials of a loss on samples that are given twice: an average stays the same, and a sum doubles.

Where outputs or targets have half precision, the loss is tried in float32. A number in bfloat16 is rounded by up to 0.4 per cent,
so that a difference of two losses may be nothing but rounding, and how a loss combines samples does not depend on precision.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_secorder.arguments import Reduction
from torch_secorder.autograd.indices import checked_on_host
from torch_secorder.autograd.precision import is_half
from torch_secorder.batch_axis.samples import BatchSamples
from torch_secorder.errors import ArgumentError
from torch_secorder.model.containers import mapped, shrunk, tensors
from torch_secorder.running.loss_calls import loss_value

LossFunction = Callable[[Any, Any], Tensor]

# The loss with every sample given twice, as a multiple of the loss.
MULTIPLES: dict[Reduction, float] = {"mean": 1.0, "sum": 2.0}

# How near the multiple must be: a sum over twice as many terms is rounded differently, by up to a percent in half precision.
NEAR, NEAR_IN_HALF_PRECISION = 1e-4, 2e-2

# The same for the multiple of a difference of two losses, which has lost digits; it only has to tell 1 from 2.
NEAR_FOR_DIFFERENCES = 0.1

# The same where the losses themselves have half precision. With eps the distance from 1 to the next number, each of two losses L
# is rounded by up to eps / 2 of itself, so that their difference D is known up to eps L, and the quotient of two differences,
# 1 or 2, up to 2 (eps L / D + eps L / D). If D is at least RESOLVED times eps L, the nearer one of 1 and 2 is right.
NEAR_FOR_ROUNDED_DIFFERENCES, RESOLVED = 0.5, 8

# How many numbers of outputs are given twice: a trial in float32 takes some thirty bytes for each of them.
MOST_NUMBERS = 2**26


@dataclass(frozen=True)
class Trials:
    """Tries a loss on samples of one batch.

    Attributes:
        loss_fn: the loss, which converts what it is given to full precision if that is possible.
        targets: the batch's targets.
        where: where the outputs and targets have their samples.
        near: how near to 1 or 2 the multiple must be.
        rounding: the distance from 1 to the next number in the precision of the losses if that is half precision, else 0.
    """

    loss_fn: LossFunction
    targets: Any
    where: BatchSamples
    near: float
    rounding: float = 0.0

    @classmethod
    def of(
        cls, loss_fn: LossFunction, outputs: Any, targets: Any, loss: Tensor, where: BatchSamples, near: float
    ) -> Trials:
        """The trials of a loss, in full precision if the first sample shows that it can be given that.

        Args:
            loss_fn: from ``(outputs, targets)`` to a loss.
            outputs: what the model returned for the batch.
            targets: the batch's targets.
            loss: its loss.
            where: where both have their samples.
            near: how near to 1 or 2 the multiple must be.
        """
        if not any(map(is_half, [*tensors(outputs), *tensors(targets)])):
            return cls(loss_fn, targets, where, near)
        try:
            full = partial(_of_converted, _converted(loss_fn))
            _number(full, where.rows("outputs", outputs, [0]), where.rows("targets", targets, [0]))
        except Exception:  # The loss has tensors of its own in half precision.
            return cls(loss_fn, targets, where, near, torch.finfo(loss.dtype).eps)
        return cls(full, targets, where, near)

    def samples(self, outputs: Any) -> list[int]:
        """All samples, or some from the first to the last if the outputs have too many numbers to be copied several times."""
        n, numbers = self.where.n, sum(x.numel() for x in tensors(outputs))
        count = min(n, max(2, n * MOST_NUMBERS // max(numbers, 1)))
        return sorted({round(index * (n - 1) / max(count - 1, 1)) for index in range(count)})

    def multiples(self, outputs: Any, choices: Sequence[list[int]]) -> list[tuple[float, float]]:
        """For each choice of samples their loss if they are given twice, as a multiple, and the same for its change.

        The change is that of the loss with other outputs. Its multiple is not affected by a constant in the loss. It is NaN if
        rounding could be all of the change.
        """
        others = mapped(shrunk, outputs)
        return [self._multiples(outputs, others, index) for index in choices]

    def _multiples(self, outputs: Any, others: Any, index: list[int]) -> tuple[float, float]:
        twice, once = self.losses(outputs, index)
        twice_other, once_other = self.losses(others, index)
        changes = (twice - twice_other, once - once_other)
        least = RESOLVED * self.rounding * max(map(abs, (twice, twice_other, once, once_other)))
        return multiple_of(twice, once), math.nan if min(map(abs, changes)) < least else multiple_of(*changes)

    def losses(self, outputs: Any, index: list[int]) -> tuple[float, float]:
        """The loss of some samples given twice, and their loss."""
        twice, once = (
            _number(self.loss_fn, self.where.rows("outputs", outputs, n), self.where.rows("targets", self.targets, n))
            for n in (index * 2, index)
        )
        return twice, once

    def reductions(self, found: Sequence[tuple[float, float]]) -> set[Reduction | None]:
        """The reductions that multiples show, None for one that fits neither; multiples that show nothing are left out.

        Raises:
            ArgumentError: if rounding hides what any change of the loss shows, for a constant in the loss would not be seen.
        """
        if self.rounding and all(math.isnan(change) and not math.isnan(multiple) for multiple, change in found):
            raise ArgumentError(
                "in half precision rounding hides whether the loss averages or sums, and it takes no outputs in float32, in "
                "which it could be tried: let it convert the outputs, and keep numbers of its own such as class weights in "
                "float32, as in lambda outputs, targets: cross_entropy(outputs.float(), targets, weight=weight.float())"
            )
        near = NEAR_FOR_ROUNDED_DIFFERENCES if self.rounding else NEAR_FOR_DIFFERENCES
        answers = [(multiple, reduction_of_multiples(multiple, change, self.near, near)) for multiple, change in found]
        return {answer for multiple, answer in answers if answer is not None or not math.isnan(multiple)}


def reduction_of_multiples(
    multiple: float, of_difference: float, near: float, near_for_differences: float = NEAR_FOR_DIFFERENCES
) -> Reduction | None:
    """The reduction that fits both multiples, as far as they are numbers; None if none fits."""
    for name, value in MULTIPLES.items():
        if not math.isnan(of_difference) and not abs(of_difference - value) < near_for_differences:
            continue
        if abs(multiple - value) < near or (math.isnan(multiple) and not math.isnan(of_difference)):
            return name
    return None


def multiple_of(a: float, b: float) -> float:
    """How many times b goes into a; NaN if b is zero or not finite."""
    return a / b if b and math.isfinite(b) else math.nan


def _of_converted(loss_fn: LossFunction, outputs: Any, targets: Any) -> Tensor:
    return loss_value(loss_fn, mapped(_full, outputs), mapped(_full, targets))


def _full(x: Tensor) -> Tensor:
    return x.float() if is_half(x) else x


def _converted(loss_fn: LossFunction) -> LossFunction:
    """The loss with its own numbers, such as class weights, in full precision. One that holds a model is left as it is."""
    if isinstance(loss_fn, nn.Module) and not any(True for _ in loss_fn.parameters()):
        return copy.deepcopy(loss_fn).float()
    return loss_fn


def _number(loss_fn: LossFunction, outputs: Any, targets: Any) -> float:
    try:
        with checked_on_host(tensors(outputs)):
            return float(loss_value(loss_fn, outputs, targets))
    except Exception as error:
        raise ArgumentError(
            f"the loss can't be told to average or to sum, since it takes no other number of samples ({str(error)[:200]}): let "
            "it get all that it has of each sample, such as weights, with its targets, in tensors with a row for each sample; "
            "or, in a list with an item for each, say so by batch_axis={'targets': 'list'}; if the targets have their samples on "
            "another axis than the outputs, name both, as in batch_axis={'outputs': 1, 'targets': 0}"
        ) from error
