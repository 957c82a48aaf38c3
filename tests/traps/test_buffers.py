"""Trap 32: buffers that a forward or a loss reads and updates. Each sample alone meets the values that its batch has met."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracles import assert_equal
from problems._base import Forward, randomized
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report, hessian_trace
from torch_secorder.errors import VerificationError
from torch_secorder.testing import check

KEPT = 6


def bank_of_features(m: Any, x: Tensor) -> Tensor:
    """Classes are the features of earlier samples, which those of this batch push out."""
    features = F.normalize(m.l(x), dim=-1)
    logits = features @ m.kept.T
    m.kept = torch.cat([features.detach(), m.kept])[:KEPT]
    return logits


def moving_average(m: Any, x: Tensor) -> Tensor:
    """What is subtracted is the mean of earlier batches."""
    features = m.l(x)
    centered = features - m.kept[0]
    m.kept = 0.9 * m.kept + 0.1 * features.detach().mean(0)
    return m.h(centered)


def counter(m: Any, x: Tensor) -> Tensor:
    """A buffer is changed in place before it is used, so that the graph saves it."""
    m.kept += 1
    return m.h(m.l(x) * m.kept[0])


FORWARDS: list[Callable[[Any, Tensor], Tensor]] = [bank_of_features, moving_average, counter]


def made(forward: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    model = randomized(Forward(forward, l=nn.Linear(3, 4), h=nn.Linear(4, KEPT)))
    model.register_buffer("kept", torch.randn(KEPT, 4))
    return model.double()


def alone(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """t_{n,p} by plain autograd, in a copy of the model for each sample."""
    found: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for i in range(len(x)):
        twin = copy.deepcopy(model)
        F.cross_entropy(twin(x[i : i + 1]), y[i : i + 1]).backward()
        for name, p in twin.named_parameters():
            found[name].append(torch.zeros(()).double() if p.grad is None else p.grad.square().sum())
    return {name: torch.stack(several) for name, several in found.items()}


@pytest.mark.parametrize("forward", FORWARDS)
def test_trap_32_buffers_that_a_forward_updates(forward: Callable[[Any, Tensor], Tensor]) -> None:
    model, x, y = made(forward), torch.randn(5, 3).double(), torch.randint(KEPT, (5,))
    before, expected = copy.deepcopy(model.state_dict()), alone(model, x, y)
    everything = sum(t.mean() for t in expected.values())
    table = fisher_report(model, F.cross_entropy, (x, y), progress=False)
    assert_equal(empirical_fisher_trace(model, F.cross_entropy, x, y), everything, everything)
    assert check(model, F.cross_entropy, (x, y)).attrs["equal"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, t in expected.items():
        assert_equal(torch.tensor(table.loc[name, "fisher_trace"]), t.mean(), everything)


@pytest.mark.parametrize("forward", FORWARDS)
def test_trap_32_buffers_that_change_from_step_to_step(forward: Callable[[Any, Tensor], Tensor]) -> None:
    model, expected = made(forward), []
    with FisherMonitor(model, per_sample=True) as monitor:
        for n in (4, 4, 2, 1, 4):
            x, y = torch.randn(n, 3).double(), torch.randint(KEPT, (n,))
            expected.append(alone(model, x, y))
            outputs = model(x)
            loss = F.cross_entropy(outputs, y)
            monitor.verify(loss)
            loss.backward()
    for name in expected[0]:
        t = torch.cat([one[name] for one in expected])
        assert_equal(torch.tensor(monitor.per_sample[name].to_numpy()), t, monitor.trace * len(t))


class WithItsLoss(nn.Module):
    """A model that computes its loss itself, with a bank that it updates."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = made(bank_of_features)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.inner(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_trap_32_a_loss_inside_of_a_model_that_updates_a_buffer() -> None:
    model, x, y = WithItsLoss(), torch.randn(5, 3).double(), torch.randint(KEPT, (5,))
    expected = alone(model.inner, x, y)
    batch = {"x": x, "labels": y}
    table = fisher_report(model, "model", [batch], progress=False)
    assert check(model, "model", batch).attrs["equal"]
    for name, t in expected.items():
        everything = sum(t.mean() for t in expected.values())
        assert_equal(torch.tensor(table.loc[f"inner.{name}", "fisher_trace"]), t.mean(), everything)


class Centering(nn.Module):
    """A loss of centered outputs. The center moves after its use, as in self-distillation, or before."""

    def __init__(self, moves: str, in_place: bool = True) -> None:
        super().__init__()
        self.moves, self.in_place = moves, in_place
        self.register_buffer("center", torch.randn(KEPT).double())
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        if self.moves == "before":
            self._move(outputs)
        loss = F.cross_entropy(outputs - self.center, targets)
        if self.moves == "after":
            self._move(outputs)
        return loss

    @torch.no_grad()
    def _move(self, outputs: Tensor) -> None:
        moved = 0.9 * self.center + 0.1 * outputs.mean(0)
        self.center = self.center.copy_(moved) if self.in_place else moved


HOLDERS: dict[str, Callable[[Centering], Callable[[Tensor, Tensor], Tensor]]] = {
    "module": lambda loss: loss,
    "closure": lambda loss: lambda outputs, targets: loss(outputs, targets),
    "partial": lambda loss: partial(lambda of, outputs, targets: of(outputs, targets), loss),
    "method": lambda loss: loss.forward,
}


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "replaced"])
@pytest.mark.parametrize("holder", HOLDERS)
def test_trap_32_a_loss_that_updates_its_buffers(holder: str, in_place: bool) -> None:
    model, x, y = nn.Linear(3, KEPT).double(), torch.randn(5, 3).double(), torch.randint(KEPT, (5,))
    loss = Centering("after", in_place)
    center, values, loss_fn = loss.center, loss.center.clone(), HOLDERS[holder](loss)
    expected: dict[str, Tensor] = {"weight": torch.zeros(5).double(), "bias": torch.zeros(5).double()}
    for n in range(5):
        one = F.cross_entropy(model(x[n : n + 1]) - values, y[n : n + 1])
        for name, g in zip(expected, torch.autograd.grad(one, (model.weight, model.bias)), strict=True):
            expected[name][n] = g.square().sum()
    everything = sum(t.mean() for t in expected.values())
    table = fisher_report(model, loss_fn, [(x, y), (x, y)], progress=False)
    for name, t in expected.items():
        assert_equal(torch.tensor(table.loc[name, "fisher_trace"]), t.mean(), everything)
    assert_equal(empirical_fisher_trace(model, loss_fn, x, y), everything, everything)
    assert check(model, loss_fn, (x, y)).attrs["equal"]
    hessian_trace(model, loss_fn, x, y, 1)
    assert loss.center is center
    assert torch.equal(center, values)
    assert loss.calls == 0


def test_trap_32_a_loss_that_moves_its_center_before_it_is_used_compares_samples() -> None:
    model, x, y = nn.Linear(3, KEPT).double(), torch.randn(5, 3).double(), torch.randint(KEPT, (5,))
    loss = Centering("before")
    values = loss.center.clone()
    with pytest.raises(VerificationError, match="changes with the other samples' outputs"):
        fisher_report(model, loss, (x, y), progress=False)
    assert torch.equal(loss.center, values)
