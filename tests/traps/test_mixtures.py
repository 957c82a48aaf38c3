"""Trap 4: a part of what is computed from parameters alone that only one sample uses, below what all of them use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles import assert_equal
from problems._base import Forward
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report
from traps.exactness import assert_exact, drawn, numbers


def recurrence(self: Any, x: Tensor) -> Tensor:
    """All samples use the first step, from which the second is computed; the samples whose first number is large use that."""
    steps = self.cells(self.start)[0][0]
    chosen = (x[:, 0] > 0).long()
    return self.head(x * steps[0] + steps[chosen].tanh())


def chain_of_layers(self: Any, x: Tensor) -> Tensor:
    """As above, with hooked layers in the place of nodes."""
    first = self.layer(self.weights).tanh()
    second = self.layer(first)
    return self.head(x * first[0] + torch.cat([second[:1] if row[0] > 0 else first[1:2] for row in x]).tanh())


def table_and_its_square(self: Any, x: Tensor) -> Tensor:
    """The same by plain operations."""
    squares = self.weights @ self.weights
    rows = [squares[0] if row[0] > 0 else self.weights[0] for row in x]
    return self.head(x * self.weights.exp()[0] + (squares * self.weights)[1] + torch.stack(rows).sin())


def stacked(self: Any, x: Tensor) -> Tensor:
    """The layer that makes the weights is the one that the samples went through, in a sum over stacked parts."""
    h = self.layer(torch.stack([x, x.sin()], 1)).relu()
    both = torch.einsum("lntd,sd->slnt", torch.stack([h, h.tanh()]), self.layer(self.weights))
    return self.head(both.sum(1).permute(1, 2, 0)).mean(1)


def model(forward: Callable[..., Any]) -> nn.Module:
    made = Forward(forward, cells=nn.GRU(4, 4, batch_first=True), layer=nn.Linear(4, 4), head=nn.Linear(4, 3))
    made.start, made.weights = nn.Parameter(torch.randn(1, 2, 4)), nn.Parameter(torch.randn(4, 4))
    return made


@pytest.mark.parametrize("large", [(1,), (0, 3), (0, 1, 2, 3), ()], ids="samples {} are large".format)
@pytest.mark.parametrize(
    "forward", [recurrence, chain_of_layers, table_and_its_square, stacked], ids=lambda f: f.__name__
)
def test_trap_04_what_one_sample_uses_below_what_all_use(forward: Callable[..., Any], large: tuple[int, ...]) -> None:
    made, x, y = drawn(model(forward), 4, 4)
    x[:, 0] = -x[:, 0].abs()
    for sample in large:
        x[sample, 0] *= -1
    monitor = assert_exact(made, x, y)
    for verify in (True, False):
        table = fisher_report(made, numbers, (x, y), progress=False, verify=verify)
        assert_equal(torch.tensor(table.fisher_trace.sum()), monitor.trace, monitor.trace)
    assert_equal(empirical_fisher_trace(made, numbers, x, y), monitor.trace, monitor.trace)


def test_trap_04_the_outputs_of_layers_in_such_a_chain() -> None:
    """Their activation traces, by the gradients of a loop over samples with respect to the outputs."""
    made, x, y = drawn(model(chain_of_layers), 4, 4)
    x[:, 0] = -x[:, 0].abs()
    x[2, 0] *= -1
    kept: list[Tensor] = []
    handle = made.layer.register_forward_hook(lambda module, args, output: kept.append(output))
    expected = 0.0
    for n in range(4):
        kept.clear()
        loss = numbers(made(x[n : n + 1]), y[n : n + 1])
        found = torch.autograd.grad(loss, kept, allow_unused=True)
        expected += sum(float(g.square().sum()) for g in found if g is not None) / 4
    handle.remove()
    with FisherMonitor(made, activations=True) as monitor:
        numbers(made(x), y).backward()
    assert monitor.activations.loc["layer", "activation_trace"] == pytest.approx(expected, rel=1e-8)
