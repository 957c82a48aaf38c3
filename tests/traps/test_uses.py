"""Traps 1 to 3: tied weights, modules called several times, parameters used outside of their module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracles import assert_equal, per_sample_squared_norms
from problems._base import Forward
from torch_secorder import FisherMonitor, fisher_report
from torch_secorder.errors import CoverageError, SlowFallbackWarning
from traps.exactness import assert_exact, drawn, numbers

# 1. Tied weights


class ThreeWays(nn.Module):
    """One table: an embedding, a head in the model's forward, and a transposed use with a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(7, 4), nn.Linear(4, 7), nn.Linear(4, 7, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x.long().abs() % 7)
        h = F.linear(self.inner(h).tanh(), 2 * self.words.weight.t())
        return self.head(h)


def test_trap_01_tied_weights() -> None:
    assert_exact(*drawn(ThreeWays(), 4, 6))


@pytest.mark.parametrize("tie", ["modules", "functions"])
@pytest.mark.parametrize("n", [3, 4, 5])
def test_trap_01_tied_weights_whose_uses_see_the_samples_in_another_order(tie: str, n: int) -> None:
    """As packed sequences do, or anything that sorts its batch: the cross terms are between rows of one sample."""

    def forward(m: Any, x: Tensor) -> Tensor:
        use = m.layer if tie == "modules" else (lambda x: F.linear(x, m.layer.weight, m.layer.bias))
        order = x[:, 0].argsort()
        return use(x).tanh() + use(2 * x[order]).tanh()[order.argsort()]

    model, x, y = drawn(Forward(forward, layer=nn.Linear(4, 3)), n, 4)
    assert_exact(model, x, y, report=False)
    assert_exact(model, x.flip(0), y, report=False)


def test_trap_01_another_order_in_every_batch() -> None:
    """What was found out for one batch need not hold for the next."""

    def forward(m: Any, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        h = F.linear(x[order], m.layer.weight).tanh()
        return F.linear(h[order.argsort()] + x, m.layer.weight)

    model, x, y = drawn(Forward(forward, layer=nn.Linear(4, 4, bias=False)), 6, 4)
    x = x[x[:, 0].argsort()]
    batches = [(x, y), (x.flip(0), y), (x[[2, 0, 1, 5, 4, 3]], y)]
    expected = torch.cat([per_sample_squared_norms(model, numbers, x, y)["layer.weight"] for x, y in batches])
    with FisherMonitor(model, per_sample=True) as monitor:
        for x, y in batches:
            numbers(model(x), y).backward()
    assert_equal(torch.tensor(monitor.per_sample["layer.weight"].to_numpy()), expected, expected.sum())


# 2. A module called several times


def test_trap_02_a_module_called_several_times_and_under_no_grad() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = m.layer(x).sigmoid()
        return m.layer(gate * m.layer(x).tanh())

    assert_exact(*drawn(Forward(forward, layer=nn.Linear(5, 5)), 4, 3, 5))


# 3. Parameters used outside of their module, or computed from others


class Gated(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        z = 2 * weight
        return z + z.square()


def test_trap_03_a_chain_with_several_ways() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Gated())
    assert_exact(*drawn(model, 5, 4))


def test_trap_03_a_parameter_used_in_its_module_and_outside_of_it() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(m.layer(x).tanh(), m.layer.weight.t()) * m.layer.bias.sum() + m.layer.weight.sum()

    assert_exact(*drawn(Forward(forward, layer=nn.Linear(4, 3)), 5, 4))


class Rounded(torch.autograd.Function):
    """A straight-through estimator, as quantization-aware training uses it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return (weight * 8).round() / 8

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 0.5


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2)


@pytest.mark.parametrize("where", ["chain", "frontier"])
def test_trap_03_a_users_own_autograd_function(where: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.layer(x).tanh()
        return F.linear(h, Rounded.apply(m.weight)) if where == "chain" else Product.apply(h, m.weight)

    model = Forward(forward, layer=nn.Linear(4, 4))
    model.weight = nn.Parameter(torch.zeros(3, 4))
    assert_exact(*drawn(model, 5, 2, 4))


def test_trap_03_a_penalty_on_weights_is_refused() -> None:
    model, x, y = drawn(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)), 5, 4)

    def penalized(outputs: Tensor, targets: Tensor) -> Tensor:
        return numbers(outputs, targets) + 0.1 * model[0].weight.square().sum()

    with pytest.raises(CoverageError, match=r"0\.weight"), FisherMonitor(model):
        penalized(model(x), y).backward()
    with pytest.raises(CoverageError, match=r"0\.weight"):
        fisher_report(model, penalized, (x, y), progress=False)


# What is slow says so


class Length(nn.Module):
    """An operation that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.hypot(x, self.weight)


def test_a_fallback_that_dominates_warns_once() -> None:
    model, x, y = drawn(Length(), 5, 4)
    with pytest.warns(SlowFallbackWarning, match=r"hypot.*register_rule") as warned, FisherMonitor(model) as monitor:
        for _ in range(3):
            numbers(model(x), y).backward()
    assert len(warned) == 1
    assert monitor.report().loc["weight", "rule"].startswith("hypot, one sample at a time")
    assert_exact(model, x, y)


@pytest.mark.parametrize("equation", ["nti,oi->nto", "tni,oi->nto", "nti,kio->nkto"])
def test_an_einsum_with_a_weight(equation: str) -> None:
    class Einsum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(*([2, 4, 3] if "k" in equation else [3, 4])))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum(equation, x.transpose(0, 1) if equation[0] == "t" else x, self.weight)

    model, x, y = drawn(Einsum(), 5, 6, 4)
    assert_exact(model, x, y)
    with FisherMonitor(model) as monitor:
        numbers(model(x), y).backward()
    assert "one sample" not in monitor.report().loc["weight", "rule"]


# Ways around the outputs, and forwards that write


def test_trap_03_a_loss_on_what_the_model_keeps_to_itself() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.aside = self.layer(x.transpose(0, 1)).transpose(0, 1)
            return x

    model, x, _ = drawn(Aside(), 5, 5, 4)
    with FisherMonitor(model), pytest.raises(CoverageError, match=r"layer.*return"):
        model(x)
        model.aside.square().mean().backward()
    assert model.layer.weight.grad is not None


def test_a_table_that_its_forward_rewrites_is_put_back() -> None:
    model = nn.Embedding(5, 4, max_norm=0.5)
    before = model.weight.detach().clone()
    fisher_report(model, lambda out, _: out.square().mean(), (torch.arange(5), None), progress=False)
    assert torch.equal(model.weight, before)


# 8. Frozen parameters leave nothing in the graph


class Elsewhere(nn.Module):
    """A frozen layer whose weight is used as a function, besides calls of the layer or without any."""

    def __init__(self, calls: bool) -> None:
        super().__init__()
        self.calls, self.layer, self.head = calls, nn.Linear(4, 4), nn.Linear(4, 3)
        self.layer.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x) if self.calls else x
        return self.head(F.linear(h, self.layer.weight).tanh())


@pytest.mark.parametrize("calls", [False, True])
def test_trap_08_a_frozen_parameter_used_as_a_function_is_refused(calls: bool) -> None:
    model, x, y = drawn(Elsewhere(calls), 5, 4)
    with (
        pytest.raises(CoverageError, match="'layer': a frozen parameter is used outside of its module's forward"),
        FisherMonitor(model, parameters="all"),
    ):
        numbers(model(x), y).backward()
    assert all(p.grad is not None for p in model.head.parameters())
    model.layer.requires_grad_(True)  # the remedy
    assert_exact(model, x, y)
