"""Frozen parameters that are differentiated for the time: what their layers give goes to numpy all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from problems._base import Forward
from torch_secorder import FisherMonitor, fisher_report
from traps.exactness import numbers


@pytest.mark.parametrize("to_numpy", [lambda h: h.numpy(), np.asarray], ids=["numpy", "asarray"])
def test_what_frozen_layers_give_goes_to_numpy_as_in_the_users_program(to_numpy: Callable[[Tensor], Any]) -> None:
    """The way through numpy is a constant, beside another one that is not."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.frozen(x)
        return m.head(x + float(to_numpy(h).mean()) + h.tanh())

    model = Forward(forward, frozen=nn.Linear(4, 4), head=nn.Linear(4, 3)).double()
    model.frozen.requires_grad_(False)
    x, y = torch.randn(1, 4).double(), torch.randn(1, 3).double()  # alone, a sample has the mean of its batch
    with FisherMonitor(model, parameters="all") as monitor:
        numbers(model(x), y).backward()
    found = fisher_report(model, numbers, (x, y), parameters="all", progress=False)["fisher_trace"]
    with torch.no_grad():
        offset = float(model.frozen(x).mean())
    weight, bias = (p.detach().clone().requires_grad_() for p in model.frozen.parameters())
    h = F.linear(x, weight, bias).tanh()
    leaves = [weight, bias, *model.head.parameters()]
    gradients = torch.autograd.grad(numbers(model.head(x + offset + h), y), leaves)
    expected = [float(g.square().sum()) for g in gradients]
    assert monitor.report()["fisher_trace"].to_list() == pytest.approx(expected, rel=1e-12)
    assert found.to_list() == pytest.approx(expected, rel=1e-12)


def test_what_trained_layers_give_does_not_go_to_numpy() -> None:
    """With a gradient of the user's own, torch's refusal is the user's."""
    model = Forward(lambda m, x: m.head(x + m.trained(x).numpy().mean()), trained=nn.Linear(4, 4), head=nn.Linear(4, 3))
    model.head.requires_grad_(False)
    with pytest.raises(RuntimeError, match="numpy"), FisherMonitor(model, parameters="all"):
        model(torch.randn(5, 4))
