"""Trap 07 in monitors: losses that compare samples, of which one hides the others by very large second derivatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracles import assert_equal, per_sample_squared_norms, total, trace
from torch_secorder import FisherMonitor
from torch_secorder.errors import VerificationError

Loss = Callable[[Tensor, Tensor], Tensor]


def normalized(outputs: Tensor) -> Tensor:
    """Rows of length one; a row of zeros is divided by 1e-12 and has slopes as large."""
    return F.normalize(outputs, dim=1)


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    z = normalized(outputs)
    return F.cross_entropy(z @ z.T, torch.arange(len(z)))


def steep(outputs: Tensor, targets: Tensor) -> Tensor:
    """One sample has curvatures of 1e12, and the others are coupled."""
    factors = torch.tensor([1e12, *[1.0] * (len(outputs) - 1)], dtype=outputs.dtype)
    own = (factors[:, None] * (outputs - targets).square()).sum(1).mean()
    return own + (outputs[1:] * outputs[1:].roll(1, 0)).sum()


def cosines(outputs: Tensor, targets: Tensor) -> Tensor:
    """Each row beside its target, though rows of zeros have no second derivatives."""
    return (1 - (normalized(outputs) * normalized(targets)).sum(1)).mean()


def steep_alone(outputs: Tensor, targets: Tensor) -> Tensor:
    factors = torch.tensor([1e12, *[1.0] * (len(outputs) - 1)], dtype=outputs.dtype)
    return (factors[:, None] * (outputs - targets).square()).sum(1).mean()


def verified(loss: Loss, closed: int) -> tuple[FisherMonitor, nn.Module, Tensor, Tensor]:
    """A monitor that has verified a loss of six outputs, of which so many are rows of zeros."""
    model = nn.Linear(4, 3, bias=False).double()
    x, y = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    x[:closed] = 0
    with FisherMonitor(model, per_sample=True) as monitor:
        outputs = model(x)
        value = loss(outputs, y)
        monitor.verify(value)
        value.backward()
    return monitor, model, x, y


@pytest.mark.parametrize("closed", [0, 1, 2, 4])
@pytest.mark.parametrize("loss", [contrastive, steep], ids=lambda loss: loss.__name__)
def test_trap_07_a_steep_sample_does_not_hide_that_others_are_compared(loss: Loss, closed: int) -> None:
    with pytest.raises(VerificationError, match="a loss that compares samples with each other"):
        verified(loss, closed)


@pytest.mark.parametrize("closed", [0, 1, 2, 5])
@pytest.mark.parametrize("loss", [cosines, steep_alone], ids=lambda loss: loss.__name__)
def test_trap_07_a_steep_sample_is_not_taken_for_one_that_is_compared(loss: Loss, closed: int) -> None:
    monitor, model, x, y = verified(loss, closed)
    if (
        loss is cosines
    ):  # The others' losses depend on a sample's number, which the loop over single samples does not know.
        expected = per_sample_squared_norms(model, loss, x, y)
        found = torch.from_numpy(monitor.per_sample["weight"].to_numpy(copy=True))
        assert_equal(found, expected["weight"], 6 * total(trace(expected)), torch.float64)
