"""Trap 22: batches whose samples a model puts into another order than those before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracles import assert_equal, per_sample_squared_norms, total, trace
from permuted import Permuted
from torch_secorder import FisherMonitor, fisher_results
from traps.exactness import numbers

Reorder = Callable[[Tensor, Tensor], Tensor]


def by_scattering(z: Tensor, order: Tensor) -> Tensor:
    return torch.zeros_like(z).scatter_reduce(0, order.argsort()[:, None].expand_as(z), z, "sum")


WAYS: dict[str, Reorder] = {
    "index": lambda z, order: z[order],
    "index of an axis counted from the last": lambda z, order: z[:, None].index_select(-3, order)[:, 0],
    "index of the second axis": lambda z, order: z.T[:, order].T,
    "select and stack": lambda z, order: torch.stack([z[int(i)] for i in order]),
    "slice and cat": lambda z, order: torch.cat([z[int(i) : int(i) + 1] for i in order]),
    "split and cat": lambda z, order: torch.cat([z.split(1)[int(i)] for i in order]),
    "unbind and stack": lambda z, order: torch.stack([z.unbind()[int(i)] for i in order]),
    "embedding": lambda z, order: F.embedding(order, z),
    "a matrix": lambda z, order: torch.eye(len(order), dtype=z.dtype)[order] @ z,
    "a matrix in a batch": lambda z, order: (torch.eye(len(order), dtype=z.dtype)[order][None] @ z[None])[0],
    "index_copy": lambda z, order: torch.zeros_like(z).index_copy(0, order.argsort(), z),
    "scatter_reduce": by_scattering,
    "take": lambda z, order: z.take(torch.arange(z.numel()).view(z.shape)[order]),
    "gather": lambda z, order: z.gather(0, order[:, None].expand_as(z)),
}


class Sorted(nn.Module):
    """A layer that the samples go through as they come, and sorted."""

    def __init__(self, reorder: Reorder) -> None:
        super().__init__()
        self.layer, self.head, self.reorder = nn.Linear(4, 4), nn.Linear(4, 3), reorder

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        inner = self.layer(self.reorder(x, order)).tanh()
        return self.head(self.layer(x) + self.reorder(inner, order.argsort()))


@pytest.mark.parametrize("before", [1, 3])  # after three, the next graph of a kind is not one that is looked through
@pytest.mark.parametrize("way", WAYS)
def test_trap_22_samples_in_another_order_than_before(way: str, before: int) -> None:
    model = Sorted(WAYS[way]).double()
    x, y = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    batches = [(x[x[:, 0].argsort()], y)] * before + [(x, y)]
    expected = per_sample_squared_norms(model, numbers, x, y)
    with FisherMonitor(model, per_sample=True) as monitor:
        for inputs, targets in batches:
            numbers(model(inputs), targets).backward()
    results = fisher_results(model, numbers, batches, per_sample=True, progress=False)
    for found in (monitor.per_sample, results.per_sample):
        for name, norms in expected.items():
            last = torch.tensor(found[name].to_numpy()[-5:])
            assert_equal(last, norms, total(trace(expected)), torch.float64)


UNCHECKED = WAYS | {"a function of the user's": Permuted.apply}


@pytest.mark.parametrize("way", UNCHECKED)
def test_trap_22_shapes_are_not_believed_where_no_sample_is_checked(way: str) -> None:
    """The first batch of a new model, with ``verify=False``; no size but that of the samples is 5."""
    model = Sorted(UNCHECKED[way]).double()
    x, y = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    expected = per_sample_squared_norms(model, numbers, x, y)
    results = fisher_results(model, numbers, (x, y), per_sample=True, progress=False, verify=False)
    for name, norms in expected.items():
        found = torch.tensor(results.per_sample[name].to_numpy())
        assert_equal(found, norms, 5 * total(trace(expected)), torch.float64)


TAKEN_APART = ("select and stack", "slice and cat", "split and cat", "unbind and stack")


@pytest.mark.parametrize("way", TAKEN_APART)
def test_trap_22_samples_that_are_checked_stay_in_place_and_others_do_not(way: str) -> None:
    """Of forty samples the first, the last and one at random are looked at; two others change places."""
    model = Sorted(WAYS[way]).double()
    x, y = torch.randn(40, 4).double(), torch.randn(40, 3).double()
    x = x[x[:, 0].argsort()]
    x[[7, 8]] = x[[8, 7]]
    expected = per_sample_squared_norms(model, numbers, x, y)
    results = fisher_results(model, numbers, (x, y), per_sample=True, progress=False)
    for name, norms in expected.items():
        found = torch.tensor(results.per_sample[name].to_numpy())
        assert_equal(found, norms, 40 * total(trace(expected)), torch.float64)
