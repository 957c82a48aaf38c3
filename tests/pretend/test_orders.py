"""An order of samples that an index on the device decides is remembered while that is the same tensor, unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pretend
from torch_secorder import FisherMonitor

N, T = 4, 8
STEPS = 12  # of which the 1st, 2nd, 3rd, 5th and 9th are examined in any case


class Shuffled(nn.Module):
    """A layer that gets its rows in an order that a buffer says."""

    def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.view = view
        self.register_buffer("order", shuffled(0))
        self.register_buffer("back", self.order.argsort())

    def forward(self, x: Tensor) -> Tensor:
        rows = self.first(x).reshape(-1, 3)[self.view(self.order)]
        return self.head(self.layer(rows).tanh()[self.view(self.back)].reshape(-1, T, 3))


def shuffled(seed: int) -> Tensor:
    return torch.randperm(N * T, generator=torch.Generator().manual_seed(seed))


def batch(step: int) -> Tensor:
    return torch.randn(N, T, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum((1, 2))


def by_a_loop(model: nn.Module, before: Callable[[nn.Module, int], None]) -> Tensor:
    """The squared norms of all samples' gradients, from a plain loop; before each step, ``before`` is told its number."""
    rows = []
    for step in range(1, STEPS + 1):
        before(model, step)
        for loss in losses_of(model, batch(step)):
            grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            rows.append(torch.stack([grad.square().sum() for grad in grads]))
    return torch.stack(rows)


def monitored(model: nn.Module, before: Callable[[nn.Module, int], None]) -> tuple[Tensor, list[int]]:
    """The same from a monitor on the device, and how often each step waited."""
    waits = []
    with FisherMonitor(model, per_sample=True) as monitor:
        for step in range(1, STEPS + 1):
            before(model, step)
            x = pretend.moved(batch(step))
            with pretend.counting() as counts:
                losses_of(model, x).mean().backward()
            waits.append(counts.waits.total())
    return torch.from_numpy(monitor.per_sample.to_numpy(copy=True)), waits


def same(model: nn.Module, step: int) -> None:
    """Nothing changes."""


def changed_in_place(model: nn.Module, step: int) -> None:
    """Every step has another order, in the same memory."""
    model.order.copy_(shuffled(step).to(model.order.device))
    model.back.copy_(model.order.argsort())


def replaced(model: nn.Module, step: int) -> None:
    """Every step has another order, in other buffers, which may get the memory of earlier ones."""
    order = shuffled(step)
    model.order, model.back = order.to(model.order.device), order.argsort().to(model.order.device)


def given_other_data(model: nn.Module, step: int) -> None:
    """Every step has another order, in the same buffers with other memory."""
    order = shuffled(step)
    model.order.data, model.back.data = order.to(model.order.device), order.argsort().to(model.order.device)


@pytest.mark.parametrize("before", [same, changed_in_place, replaced, given_other_data], ids=lambda f: f.__name__)
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.view(2, -1).flatten()], ids=["whole", "view"])
def test_an_order_on_the_device(before: Callable[[nn.Module, int], None], view: Callable[[Tensor], Tensor]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Shuffled(view).double()
    expected = by_a_loop(copy.deepcopy(model), before)
    found, waits = monitored(pretend.moved(model), before)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    once = {step for step, count in enumerate(waits, start=1) if count == 1}
    assert once == ({4, 6, 7, 8, 10, 11, 12} if before is same else set())
