"""Which blocks share a schedule of checks: those that the program comes to in the same way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_secorder import FisherMonitor
from torch_secorder.errors import CoverageError


def measured(model: nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """What a program writes once and calls from many places."""
    with FisherMonitor(model) as monitor:
        loss(model(x)).backward()
    return float(monitor.trace)


def test_a_function_that_is_called_with_another_loss_elsewhere_is_checked_there() -> None:
    model, x, y = nn.Linear(4, 3), torch.randn(5, 4), torch.randint(3, (5,))
    for _ in range(6):
        measured(model, lambda outputs: F.cross_entropy(outputs, y), x)
    with pytest.raises(CoverageError, match="a weight penalty"):
        measured(model, lambda outputs: F.cross_entropy(outputs, y) + model.weight.square().sum(), x)


def test_a_pass_of_some_parameters_is_refused_each_time() -> None:
    """A refused pass is none of those after which a kind of graph is looked at less often."""
    model, x, y = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4), torch.randint(3, (6,))
    with FisherMonitor(model) as monitor:
        for _ in range(8):
            with pytest.raises(CoverageError, match=r"no gradient of 0\.weight"):
                F.cross_entropy(model(x), y).backward(inputs=[model[2].weight])
        F.cross_entropy(model(x), y).backward()
    assert monitor.n_samples == len(x)
