"""Examples of losses, which save how they combine the samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from torch_secorder.autograd.node_examples.registry import EXAMPLES, Example, indices, numbers


def _summed(loss: Callable[..., Tensor]) -> Example:
    return loss(numbers(2, 3), numbers(2, 3).detach().abs(), reduction="sum"), {"reduction": 2}


def _nll() -> Example:
    return F.cross_entropy(numbers(2, 3), indices(0, 2), reduction="sum"), {"reduction": 2}


def _nll_of_positions() -> Example:
    return F.cross_entropy(numbers(2, 3, 1, 1), indices(0, 2)[:, None, None], reduction="sum"), {"reduction": 2}


def _bce() -> Example:
    return _summed(lambda x, y, reduction: F.binary_cross_entropy(x.sigmoid(), y, reduction=reduction))


_SUMMED: dict[str, Callable[..., Tensor]] = {
    "MseLossBackward0": F.mse_loss,
    "SmoothL1LossBackward0": F.smooth_l1_loss,
    "HuberLossBackward0": F.huber_loss,
    "BinaryCrossEntropyWithLogitsBackward0": F.binary_cross_entropy_with_logits,
}
EXAMPLES.update({kind: partial(_summed, loss) for kind, loss in _SUMMED.items()})
EXAMPLES.update(
    {"NllLossBackward0": _nll, "NllLoss2DBackward0": _nll_of_positions, "BinaryCrossEntropyBackward0": _bce}
)
