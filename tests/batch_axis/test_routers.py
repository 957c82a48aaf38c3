"""Mixtures of experts whose router orders anew in each step: exact, and without a search in each."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from routers import (
    LOOKED_AT,
    ROUTES,
    STEPS,
    WIDTH,
    N,
    T,
    back_by_an_index,
    batch,
    by_a_loop,
    by_parts,
    eager,
    in_order_of_experts,
    losses_of,
    made,
    require_same,
    squared_norms,
    with_capacity,
)
from torch_secorder import FisherMonitor
from torch_secorder.autograd.self_test import hooks_are_seen
from torch_secorder.batch_axis.derivation import Derivation
from torch_secorder.batch_axis.evidence import Finding
from torch_secorder.batch_axis.placement import Layout, Placement
from torch_secorder.batch_axis.search_pass import Viewed
from torch_secorder.testing import sample_gradients


def monitored(model: nn.Module, searches: list[int]) -> tuple[dict[str, Tensor], list[int]]:
    """The same from a monitor, and the steps in which it searched."""
    looked = []
    with FisherMonitor(model, per_sample=True) as monitor:
        for step in range(1, STEPS + 1):
            searches.clear()
            losses_of(model, batch(step)).mean().backward()
            looked += [step] if searches else []
    return squared_norms(monitor), looked


# Its nodes are asked what they do. Where torch does not show that no hook would notice, marks are sent in each step.
UNASKED = set() if hooks_are_seen() else {by_parts}


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
def test_an_order_that_is_new_in_each_step(route: Callable[..., Tensor], searches: list[int]) -> None:
    model = made(route)
    expected = by_a_loop(model)
    found, looked = monitored(model, searches)
    require_same(found, expected)
    assert looked == ([*range(1, STEPS + 1)] if route in UNASKED else LOOKED_AT)


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


def test_rows_that_a_function_turns_to_columns_are_searched_for(searches: list[int]) -> None:
    class Turned(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.t().clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad.t()

    model = made(lambda self, tokens: Turned.apply(Turned.apply(back_by_an_index(self, tokens))))
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
