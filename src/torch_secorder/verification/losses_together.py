"""Whether the loss of several samples is a weighted average of their losses alone, with weights that belong to the samples.

With weights w_n, an average is ``sum_n w_n l_n / sum_n w_n``, and its gradient is the same average of gradients. A loss that
compares samples may look like such an average, too: the gradient of a root of a mean is an average of the gradients of the roots,
and the root itself nearly is one if the samples' losses are nearly equal. But those weights depend on the samples' losses, which
change with the parameters, while weights that belong to samples, such as numbers of tokens, do not change. So the loss is
evaluated at other parameters, until the samples' losses differ there and every two of them have changed their order. The order
matters, since a loss in which samples rank each other is an average until the order changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from torch_secorder.errors import VerificationError
from torch_secorder.verification.differentiable_model import DifferentiableModel
from torch_secorder.verification.plain_autograd import as_row, squared_norms_of_loss
from torch_secorder.verification.tolerances import OWN_GRADIENT_OF_SEVERAL, OWN_LOSS_OF_SEVERAL

LossOfSamples = Callable[[DifferentiableModel, Sequence[int]], Tensor]

# How far from the model's own parameters a loss is evaluated, in units of their size, and the seed of the direction. The steps
# are far enough for losses to differ, and go back and forth to change their order. The last is short, in case numbers overflow.
STEPS = (*((step, seed) for seed in range(5) for step in (3.0, -3.0)), (0.5, 5))

# The loss is evaluated at least this many times, since a loss may have the same value for every sample.
FEWEST = 2

# The losses of samples differ if the largest and the smallest are farther apart than this, as a fraction of their size.
DIFFERENT = 0.2


def require_explained(
    models: Sequence[Callable[[], DifferentiableModel]], loss: LossOfSamples, shares: Mapping[int, float], bits: int
) -> None:
    """Raise unless the loss of some samples together, and its gradient, are the sums of their shares, taken alone.

    Args:
        models: functions that return the model at other parameters; the last one returns it at its own, which are used if no
            others give finite numbers and losses that differ.
        loss: from a model and the numbers of samples to the loss of these samples.
        shares: for each sample, by its number, the factor of its loss in the loss of all of them.
        bits: the precision of the products that gradients are sums of.

    Raises:
        VerificationError: if not.
    """
    *others, own = models
    here = _losses_alone(own(), loss, shares)
    unturned, count, differ = set(combinations(range(len(here)), 2)), 0, False
    for elsewhere in others:
        try:
            model = elsewhere()
            there = _losses_alone(model, loss, shares)
            turned = {(i, j) for i, j in unturned if (here[i] - here[j]) * (there[i] - there[j]) < 0}
            if count >= FEWEST and not turned:
                continue
            look = _look(model, loss, shares)
        except Exception:  # A model may check its parameters.
            continue
        if look.is_finite:
            look.require(bits)
            unturned, count, differ = unturned - turned, count + 1, differ or look.differ
            if differ and not unturned:
                return
    if not differ:
        _look(own(), loss, shares).require(bits)


@dataclass(frozen=True)
class _Look:
    """The losses of some samples for one model.

    Attributes:
        alone: the loss of each sample alone.
        shares: the factor of each.
        together: the loss of all of them.
        gradients: the sum of ``||gradient of a share||^2`` over the samples.
        unexplained: ``||gradient of (the loss of all minus the sum of the shares)||^2``.
    """

    alone: list[float]
    shares: list[float]
    together: float
    gradients: float
    unexplained: float

    @property
    def is_finite(self) -> bool:
        """Whether all of these numbers are finite."""
        return all(map(math.isfinite, (*self.alone, self.together, self.gradients, self.unexplained)))

    @property
    def differ(self) -> bool:
        """Whether the samples' losses differ, so that weights made of them would differ, too."""
        return max(self.alone) - min(self.alone) > DIFFERENT * max(map(abs, self.alone))

    def require(self, bits: int) -> None:
        """Raise unless the shares explain the loss and its gradient."""
        parts = [share * loss for share, loss in zip(self.shares, self.alone, strict=True)]
        expected, size = sum(parts), sum(map(abs, parts))
        if not abs(self.together - expected) <= OWN_LOSS_OF_SEVERAL[bits] * size:
            raise _unexplained(
                f"the loss that the model computes is {self.together:.6g} for {len(parts)} samples together, and their losses "
                f"alone make {expected:.6g}"
            )
        if not self.unexplained <= OWN_GRADIENT_OF_SEVERAL[bits] ** 2 * self.gradients:
            raise _unexplained(
                f"the gradient of the loss that the model computes for {len(parts)} samples together is not what the gradients "
                f"of their losses alone make: of {math.sqrt(self.gradients):.6g} it is off by {math.sqrt(self.unexplained):.6g}"
            )


def _losses_alone(model: DifferentiableModel, loss: LossOfSamples, samples: Iterable[int]) -> list[float]:
    with torch.no_grad():
        return [float(loss(model, [sample])) for sample in samples]


def _look(model: DifferentiableModel, loss: LossOfSamples, shares: Mapping[int, float]) -> _Look:
    squares = sum(_squared_norm(share * loss(model, [sample]), model) for sample, share in shares.items())
    alone = {sample: loss(model, [sample]) for sample in shares}
    together = loss(model, list(shares))
    unexplained = together - sum(share * alone[sample] for sample, share in shares.items())
    values = [float(value.detach()) for value in alone.values()]
    return _Look(values, list(shares.values()), float(together.detach()), squares, _squared_norm(unexplained, model))


def _squared_norm(loss: Tensor, model: DifferentiableModel) -> float:
    return float(as_row(squared_norms_of_loss(loss, model.leaves)).sum())


def _unexplained(what: str) -> VerificationError:
    return VerificationError(
        f"{what}: a loss that compares samples with each other (contrastive, load balancing, a root or a logarithm of a mean, "
        "weights made of the samples' losses) has no per-sample gradients"
    )
