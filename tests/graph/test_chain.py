"""The product of a batch-free chain: autograd's own, sample by sample, and without a hook of anybody's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from torch_secorder.autograd.route import Route
from torch_secorder.graph.chain import batch_free_vjp, pulled_back
from torch_secorder.per_sample import Dense, Outer, PulledBack
from torch_secorder.per_sample.budget import memory_limit

CHAINS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "nothing": (lambda w: w, True),
    "transpose": (lambda w: w.T, True),
    "chunk": (lambda w: w.chunk(2)[1], True),
    "view of a chunk": (lambda w: w.view(2, 2, 3)[1].reshape(-1), True),
    "one and the weight": (lambda w: 1 + w, True),
    "all but a constant of its shape": (lambda w: w - torch.ones(4, 3), True),
    "a transpose and one": (lambda w: w.T + 1, True),
    "minus the weight": (lambda w: torch.ones(4, 3, dtype=torch.float64).sub(w), False),
    "twice the weight": (lambda w: torch.ones(4, 3, dtype=torch.float64).add(w, alpha=2), False),
    "a larger constant": (lambda w: w + torch.ones(2, 4, 3), False),
    "a sum in another dtype": (lambda w: w.float() + torch.ones(4, 3, dtype=torch.float64), False),
    "weight norm": (lambda w: w / w.norm(dim=1, keepdim=True), False),
    "several ways": (lambda w: w * w.sum() + w.exp(), False),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_carries_each_samples_gradient_back(name: str) -> None:
    function, permutes = CHAINS[name]
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    value = function(weight)
    grads = torch.randn(5, *value.shape, dtype=torch.float64)
    expected = torch.stack([torch.autograd.grad(value, weight, g, retain_graph=True)[0] for g in grads])
    told: list[Tensor] = []
    weight.register_hook(told.append)
    start, edge = get_gradient_edge(weight).node, get_gradient_edge(value)
    vjp = batch_free_vjp((edge.node, edge.output_nr), start, (4, 3))
    form = vjp(Dense(grads))
    assert (vjp.permutation is not None) == permutes
    assert form.n == 5
    torch.testing.assert_close(form.dense(), expected)
    torch.testing.assert_close(form.squared_norm(), expected.flatten(1).square().sum(1))
    assert not told
    assert weight.grad is None


def test_a_transposed_product_stays_a_product() -> None:
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    edge = get_gradient_edge(weight.T)
    vjp = batch_free_vjp((edge.node, edge.output_nr), get_gradient_edge(weight).node, (4, 3))
    form = Outer(torch.randn(5, 1, 2, 4).double(), torch.randn(5, 1, 2, 3).double(), (3, 4))
    turned = vjp(form)
    assert isinstance(turned, Outer)
    torch.testing.assert_close(turned.dense(), form.dense().mT)


def test_chains_that_move_entries_alike_are_told_from_others() -> None:
    weight = torch.randn(4, 3, requires_grad=True)

    def permutation(value: Tensor) -> object:
        edge = get_gradient_edge(value)
        return batch_free_vjp((edge.node, edge.output_nr), get_gradient_edge(weight).node, (4, 3)).permutation

    assert permutation(weight[:2]) == permutation(weight[:2])
    assert permutation(weight[:2]) != permutation(weight[2:])
    first, second = (
        PulledBack(Dense(torch.ones(5, 2, 3)), lambda g: g, (4, 3), permutation(weight[s]))
        for s in (slice(2), slice(2, 4))
    )
    assert first.concatenated(first) is not None
    assert first.concatenated(second) is None


def test_gradients_flow_once_for_all_starts_of_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network over a table that all samples share: its weights lie on one way, of which each node is called once a sample."""
    table, first, last = (torch.randn(*shape, dtype=torch.float64) for shape in ((6, 3), (3, 4), (4, 2)))
    leaves = [leaf.requires_grad_() for leaf in (table, first, last)]
    value = (table @ first).tanh() @ last
    grads = torch.randn(5, *value.shape, dtype=torch.float64)
    expected = [
        torch.stack([torch.autograd.grad(value, leaf, grad, retain_graph=True)[0] for grad in grads]) for leaf in leaves
    ]
    edge, calls = get_gradient_edge(value), []
    starts = [get_gradient_edge(leaf).node for leaf in leaves]
    chains = [
        batch_free_vjp((edge.node, edge.output_nr), start, tuple(leaf.shape), frozenset(starts))
        for start, leaf in zip(starts, leaves, strict=True)
    ]
    flow = Route.flow
    monkeypatch.setattr(Route, "flow", lambda *args, **how: (calls.append(1), flow(*args, **how)))
    forms = pulled_back(Dense(grads), chains)
    for form, right in zip(forms, expected, strict=True):
        torch.testing.assert_close(form.dense(), right)
        torch.testing.assert_close(form.squared_norm(), right.flatten(1).square().sum(1))
    assert len(calls) == 5
    for form, right in zip(forms, expected, strict=True):
        torch.testing.assert_close(form.select(slice(1, 3)).dense(), right[1:3])
    with memory_limit(1):
        assert all(form.value.dense() is grads for form in pulled_back(Dense(grads), chains))
