"""Trap 16: random draws and routing are those of the user's forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracles import assert_equal, total, trace
from problems._base import Forward
from torch_secorder import FisherMonitor
from traps.exactness import assert_exact, drawn, numbers, of_one_graph


class Noisy(nn.Module):
    """Dropout before, in and after everything, parameters included, and a router."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
        self.recurrent = nn.LSTM(8, 8, num_layers=2, dropout=0.3, batch_first=True)
        self.experts, self.router = nn.Parameter(torch.zeros(3, 8, 8)), nn.Linear(8, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x + F.dropout(self.places(torch.arange(x.shape[1])), 0.3, self.training)
        h = h + self.attention(h, h, h)[0]
        h = F.dropout(self.recurrent(h)[0], 0.3, self.training).flatten(0, 1)
        scores, chosen = self.router(h).softmax(-1).max(-1)
        routed = torch.zeros_like(h)
        for expert in range(3):
            rows = (chosen == expert).nonzero().squeeze(1)
            out = F.linear(h[rows], F.dropout(self.experts[expert], 0.3, self.training)) * scores[rows, None]
            routed = routed.index_add(0, rows, out)
        return self.head(h + routed).unflatten(0, x.shape[:2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_trap_16_random_draws_and_routing_are_those_of_the_users_forward(dtype: torch.dtype) -> None:
    model, x, y = drawn(Noisy().train(), 5, 6, 8)
    model, x, y = model.to(dtype), x.to(dtype), y.to(dtype)
    torch.manual_seed(3)
    expected = of_one_graph(model, (model(x) - y).square().flatten(1).sum(1))
    torch.manual_seed(3)
    plain = torch.randn(2)
    torch.manual_seed(3)
    model(x)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    with FisherMonitor(model) as monitor:
        numbers(model(x), y).backward()
    assert torch.equal(torch.get_rng_state(), after), "the monitor draws nothing"
    assert plain.shape == (2,)
    for name, t in expected.items():
        found = torch.tensor(monitor.report().loc[name, "fisher_trace"])
        assert_equal(found, t.mean(), total(trace(expected)), dtype)


class Routed(nn.Module):
    """Experts that get as many rows as fall to them, none in most batches; or each sample's rows in a call of its own."""

    def __init__(self, expert: Callable[[], nn.Module], way: str) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(6, 5), nn.ModuleList([expert() for _ in range(5)])
        self.head, self.way = nn.Linear(6, 3), way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "experts":
            rows = x.flatten(0, 1)
            chosen, found = self.router(rows).argmax(1), torch.zeros_like(rows)
            for number, expert in enumerate(self.experts):
                mine = (chosen == number).nonzero().squeeze(1)
                found = found.index_add(0, mine, expert(rows[mine]).tanh())
            return self.head(found.view_as(x).mean(1))
        if self.way == "sample":  # as many rows as features, whose axes must not be confused
            return self.head(torch.stack([self.experts[0](rows).tanh().mean(0) for rows in x]))
        return self.head(torch.cat([self.experts[0](row).tanh() for row in x[:, 0].split(1)]))


EXPERTS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 6),
    "layer norm": lambda: nn.LayerNorm(6),
    "group norm": lambda: nn.GroupNorm(2, 6),
    "running statistics": lambda: nn.BatchNorm1d(6).eval(),
    "slopes": lambda: nn.PReLU(6),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 2, 3, padding=1), nn.Flatten()),
}


@pytest.mark.parametrize("way", ["experts", "sample", "row"])
@pytest.mark.parametrize("name", EXPERTS)
def test_trap_16_rows_of_one_sample_and_no_rows(name: str, way: str) -> None:
    torch.manual_seed(3)
    assert_exact(*drawn(Routed(EXPERTS[name], way), 4, 6, 6))


class Scaled(nn.Module):
    """Like many norms: a weight times something that is not its own business, and not the same thing in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, gate: Tensor | None = None, *, power: float = 1.0) -> Tensor:
        x = x if gate is None else x * F.silu(gate)
        n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) ** power
        return F.dropout(n, 0.5, self.training) * self.weight


def calls_of_scaled() -> Iterator[Any]:
    yield pytest.param(lambda m, x: m.two(m.scaled(m.one(x), x)), id="second argument")
    yield pytest.param(lambda m, x: m.two(m.scaled(m.one(x), gate=x)), id="keyword")
    yield pytest.param(lambda m, x: m.two(m.scaled(x=m.one(x), power=0.5)), id="all by keyword")


@pytest.mark.parametrize("forward", list(calls_of_scaled()))
def test_trap_16_a_norm_with_several_arguments(forward: Any) -> None:
    model, x, y = drawn(Forward(forward, one=nn.Linear(4, 4), scaled=Scaled(), two=nn.Linear(4, 3)), 5, 2, 4)
    assert_exact(model.eval(), x, y)


def test_trap_16_a_layer_that_begins_to_draw_random_numbers() -> None:
    """Deterministic when the monitor was entered, and for several batches."""
    model, x, y = drawn(nn.Sequential(nn.Linear(4, 4), Scaled(), nn.Linear(4, 3)), 5, 4)
    model.train()
    torch.manual_seed(3)
    expected = of_one_graph(model, (model(x) - y).square().flatten(1).sum(1))
    model.eval()
    with FisherMonitor(model, per_sample=True) as monitor:
        for _ in range(3):
            numbers(model(x), y).backward()
        model.train()
        torch.manual_seed(3)
        numbers(model(x), y).backward()
    for name, t in expected.items():
        assert_equal(torch.tensor(monitor.per_sample[name].to_numpy()[-5:]), t, monitor.trace)
