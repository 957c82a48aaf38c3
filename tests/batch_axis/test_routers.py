"""Mixtures of experts whose router orders anew in each step: exact, and without a search in each."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pretend
from torch_secorder import FisherMonitor
from torch_secorder.batch_axis.derivation import Derivation
from torch_secorder.batch_axis.evidence import Finding
from torch_secorder.batch_axis.placement import Layout, Placement
from torch_secorder.batch_axis.search_pass import SearchPasses, Viewed
from torch_secorder.testing import sample_gradients

pretend.register()  # before the first backward pass

N, T, WIDTH, EXPERTS = 4, 6, 5, 3
CAPACITY = 7
STEPS = 8  # of which passes look at the 1st, 2nd, 3rd and 5th
LOOKED_AT = [1, 2, 3, 5]


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that marks are sent through a graph."""
    made: list[int] = []
    findings = SearchPasses.findings

    def counted(self: SearchPasses, wanted: list[Viewed]) -> object:
        made.append(len(wanted))
        return findings(self, wanted)

    monkeypatch.setattr(SearchPasses, "findings", counted)
    return made


class Mixture(nn.Module):
    """Attention, then experts that get the tokens that a router sends them, and a shared expert."""

    def __init__(self, route: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.router, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, 2)
        self.qkv, self.shared = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = (nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH)) for _ in range(2))
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS)])
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.route = route

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for _ in range(2):
            q, k, v = self.qkv(h).unflatten(2, (3, 1, WIDTH)).permute(2, 0, 3, 1, 4)
            h = h + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            tokens = F.layer_norm(h, (WIDTH,)).flatten(0, 1)
            h = h + (self.route(self, tokens) + self.shared(tokens)).view_as(h)
        return self.head(h)


def eager(self: Any, tokens: Tensor) -> Tensor:
    """Each token to its two best experts, in a loop over these; one expert may have none."""
    weights, chosen = self.router(tokens).softmax(-1).topk(2, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(tokens)
    for number, expert in enumerate(self.experts):
        row, place = torch.where(chosen == number)
        own = expert(tokens[None, row].reshape(-1, WIDTH)).tanh() * weights[row, place, None]
        out.index_add_(0, row, own)
    return out


def in_order_of_experts(self: Any, tokens: Tensor) -> Tensor:
    """Pairs of tokens and experts, sorted by expert, through a stack of matrices, and back; a scale for all rows."""
    weights, chosen = self.router(tokens).topk(2, -1)
    order = chosen.flatten().argsort(stable=True)
    counts = chosen.flatten().bincount(minlength=EXPERTS).tolist()
    rows = (tokens[order // 2] * self.scale).split(counts)
    made = torch.cat([part @ up @ down for part, up, down in zip(rows, self.up, self.down, strict=True)])
    made = made * weights.softmax(-1).flatten()[order][:, None]
    return torch.zeros_like(tokens).index_add(0, order // 2, made)


def back_by_an_index(self: Any, tokens: Tensor) -> Tensor:
    """The same, but put back in order and added up by token."""
    weights, chosen = self.router(tokens).softmax(-1).topk(2, -1)
    order = chosen.flatten().argsort(stable=True)
    counts = chosen.flatten().bincount(minlength=EXPERTS).tolist()
    parts = zip(tokens.index_select(0, order // 2).split(counts), self.experts, strict=True)
    made = torch.cat([expert(part) for part, expert in parts])[order.argsort()]
    return (made.view(-1, 2, WIDTH) * weights[:, :, None]).sum(1)


def with_capacity(self: Any, tokens: Tensor) -> Tensor:
    """Each token to its best expert, which takes so many; the rest is dropped, and places may stay empty."""
    weights, chosen = self.router(tokens).softmax(-1).max(-1)
    taken = F.one_hot(chosen, EXPERTS)
    place = ((taken.cumsum(0) - 1) * taken).sum(1)
    kept = place < CAPACITY
    slot = (chosen * CAPACITY + place)[kept]
    places = tokens.new_zeros(EXPERTS * CAPACITY, WIDTH).index_copy(0, slot, tokens[kept])
    made = places.view(EXPERTS, CAPACITY, WIDTH).bmm(self.up).tanh().flatten(0, 1)
    out = torch.zeros_like(tokens)
    out[kept] = made[slot] * weights[kept, None]
    return out


def by_scatter(self: Any, tokens: Tensor) -> Tensor:
    """Each expert chooses its tokens, and some tokens are nobody's."""
    weights, row = self.router(tokens).softmax(-1).topk(CAPACITY, 0)
    parts = [expert(tokens[row[:, number]]) for number, expert in enumerate(self.experts)]
    made = torch.cat(parts) * weights.t().reshape(-1, 1)
    index = row.t().reshape(-1, 1).expand(-1, WIDTH)
    return torch.zeros_like(tokens).scatter_add(0, index, made)


def masked(self: Any, tokens: Tensor) -> Tensor:
    """Tokens that a mask picks for each expert."""
    chosen, out = self.router(tokens).argmax(-1), torch.zeros_like(tokens)
    for number, expert in enumerate(self.experts):
        out[chosen == number] = expert(tokens[chosen == number])
    return out + 0 * self.router(tokens).sum(-1, keepdim=True)


ROUTES = [eager, in_order_of_experts, back_by_an_index, with_capacity, by_scatter, masked]


def made(route: Callable[..., Tensor]) -> Mixture:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mixture(route).double()
        nn.init.normal_(model.router.weight, std=2.0)
        nn.init.zeros_(model.router.bias)
        return model


def batch(step: int) -> Tensor:
    return torch.randn(N, T, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum((1, 2))


def by_a_loop(model: nn.Module) -> dict[str, Tensor]:
    """The squared norms of all samples' gradients, in float64, from the gradient of each sample's loss alone."""
    rows = []
    for step in range(1, STEPS + 1):
        for loss in losses_of(model, batch(step)):
            grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
            rows.append(torch.stack([loss.new_zeros(()) if g is None else g.square().sum() for g in grads]))
    return dict(zip(dict(model.named_parameters()), torch.stack(rows).T, strict=True))


def monitored(model: nn.Module, searches: list[int]) -> tuple[dict[str, Tensor], list[int]]:
    """The same from a monitor, and the steps in which it searched."""
    looked = []
    with FisherMonitor(model, per_sample=True) as monitor:
        for step in range(1, STEPS + 1):
            searches.clear()
            losses_of(model, batch(step)).mean().backward()
            looked += [step] if searches else []
    table = monitor.per_sample
    return {name: torch.from_numpy(table[name].to_numpy(copy=True)) for name in table}, looked


def require_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        # In float64 the sums' order makes a difference of some ten units in the last place.
        torch.testing.assert_close(
            found[name], values, rtol=1e-10, atol=1e-20, msg=lambda text, name=name: f"{name}: {text}"
        )


# What the routers themselves wait for, on a device.
OWN_WAITS = {eager: 6, in_order_of_experts: 4, back_by_an_index: 4, with_capacity: 14, by_scatter: 0}


@pytest.mark.parametrize("route", OWN_WAITS, ids=lambda route: route.__name__)
def test_on_a_device_the_host_waits_for_the_indices_and_for_the_end(route: Callable[..., Tensor]) -> None:
    model = made(route)
    expected = by_a_loop(model)
    pretend.moved(model)
    waits = []
    with FisherMonitor(model, per_sample=True) as monitor:
        for step in range(1, STEPS + 1):
            x = pretend.moved(batch(step))
            with pretend.counting() as counts:
                losses_of(model, x).mean().backward()
            waits.append(counts.waits.total())
    table = monitor.per_sample
    require_same({name: torch.from_numpy(table[name].to_numpy(copy=True)) for name in table}, expected)
    steady = [count for step, count in enumerate(waits, start=1) if step not in LOOKED_AT]
    assert steady == [OWN_WAITS[route] + 2] * len(steady)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
def test_an_order_that_is_new_in_each_step(route: Callable[..., Tensor], searches: list[int]) -> None:
    model = made(route)
    expected = by_a_loop(model)
    found, looked = monitored(model, searches)
    require_same(found, expected)
    assert looked == LOOKED_AT


def test_every_step_has_another_order() -> None:
    """As the tests above take it to have."""
    model = made(eager)
    chosen = [model.router(model.first(batch(step))).argmax(-1) for step in range(1, STEPS + 1)]
    assert all(not torch.equal(one, other) for one, other in itertools.pairwise(chosen))


def test_tokens_are_dropped() -> None:
    """As a test above takes them to be."""
    dropped = []

    def noted(self: Any, tokens: Tensor) -> Tensor:
        out = with_capacity(self, tokens)
        dropped.append(int((out == 0).all(1).sum()))
        return out

    model = made(noted)
    for step in range(1, STEPS + 1):
        model(batch(step))
    assert max(dropped) > 0


def test_what_passes_contradict_is_believed_no_more(searches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A derivation that turns the samples around: the step is right all the same, and each later one is searched."""
    findings = Derivation.findings

    def wrong(self: Derivation, wanted: list[Viewed]) -> list[Finding] | None:
        found = findings(self, wanted) or []
        return [Finding(turned(one.evidence)) for one in found]

    def turned(evidence: object) -> Any:
        if isinstance(evidence, Placement) and evidence.sample_index is not None:
            return Placement(0, Layout.INDEXED, N - 1 - evidence.sample_index)
        return evidence

    model = made(in_order_of_experts)
    expected = by_a_loop(model)
    monkeypatch.setattr(Derivation, "findings", wrong)
    found, looked = monitored(model, searches)
    require_same(found, expected)
    assert looked == list(range(1, STEPS + 1))


def test_what_hides_behind_a_function_is_searched_for(searches: list[int]) -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 2

    model = made(lambda self, tokens: Doubled.apply(back_by_an_index(self, tokens)))
    expected = by_a_loop(model)
    found, looked = monitored(model, searches)
    require_same(found, expected)
    assert looked == list(range(1, STEPS + 1))


def test_a_router_of_samples_by_what_no_rule_tells(searches: list[int]) -> None:
    """A matrix of zeros and ones puts rows into another order, of which the nodes say nothing."""

    def by_a_matrix(self: Any, tokens: Tensor) -> Tensor:
        order = self.router(tokens)[:, 0].argsort()
        matrix = torch.eye(len(order), dtype=tokens.dtype)[order]
        return matrix.T @ self.experts[0](matrix @ tokens).tanh()

    model = made(by_a_matrix)
    expected = by_a_loop(model)
    found, looked = monitored(model, searches)
    require_same(found, expected)
    assert looked == list(range(1, STEPS + 1))


class AddedConstants(nn.Module):
    """Rows that need no gradient are added where an order of each batch's own says, so that autograd keeps no index of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        order = x[..., 0].flatten().argsort()
        h = self.first(x).flatten(0, 1)
        h = h.index_add(0, order, torch.ones_like(h).detach()).index_select(0, order)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        return self.last(h.tanh().index_select(0, back)).view(*x.shape[:2], 2).mean(1)


def test_an_index_that_no_gradient_needs_is_not_kept() -> None:
    model, x, y = AddedConstants().double(), torch.randn(STEPS, N, T, 3).double(), torch.randn(STEPS, N, 2).double()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum(1).mean()

    right = [sample_gradients(model, loss, *batch) for batch in zip(x, y, strict=True)]
    with FisherMonitor(model, per_sample=True) as monitor:
        for inputs, targets in zip(x, y, strict=True):
            loss(model(inputs), targets).backward()
    for name in right[0]:
        expected = torch.cat([gradients[name].flatten(1).square().sum(1) for gradients in right])
        assert list(monitor.per_sample[name]) == pytest.approx(expected.tolist(), rel=1e-8)
