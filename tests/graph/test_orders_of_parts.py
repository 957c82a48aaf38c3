"""Models that take single samples and put them together in an order of each batch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from torch_secorder import FisherMonitor, fisher_results
from torch_secorder.testing import sample_gradients

Order = list[int]


class Ordered(nn.Module):
    """A layer that sees the samples in another order, and a way around it."""

    def __init__(self, ordered: Callable[[Tensor, Order], Tensor]) -> None:
        super().__init__()
        self.first, self.layer, self.last, self.ordered = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3), ordered

    def forward(self, x: Tensor) -> Tensor:
        h, order = self.first(x), x[:, 0].argsort().tolist()
        z = self.layer(self.ordered(h, order)).tanh()
        return self.last(h + self.ordered(z, [order.index(n) for n in range(len(order))]))


def parts(h: Tensor, order: Order) -> Tensor:
    pieces = h.split(1)
    return torch.cat([pieces[n] for n in order])


def rows(h: Tensor, order: Order) -> Tensor:
    return torch.stack([h.unbind()[n] for n in order])


def of_each(h: Tensor, order: Order) -> Tensor:
    pieces = [piece.tanh() for piece in h.split(1)]
    return torch.cat([pieces[n] for n in order])


def of_each_twice(h: Tensor, order: Order) -> Tensor:
    """The graph has met all pieces before it comes to their order."""
    pieces = [piece.tanh() for piece in h.split(1)]
    return torch.cat([pieces[n] for n in order]) + 0 * torch.cat(pieces).sum(0)


def with_a_spare_row(h: Tensor, order: Order) -> Tensor:
    """The rows are taken of a buffer that has one more, which is no multiple of n."""
    return torch.cat([h, h.new_zeros(1, h.shape[1])])[torch.tensor(order)]


def by_selecting_of_more(h: Tensor, order: Order) -> Tensor:
    return torch.cat([h, h.new_zeros(1, h.shape[1])]).index_select(0, torch.tensor(order))


def by_embedding_of_more(h: Tensor, order: Order) -> Tensor:
    return torch.embedding(torch.cat([h, h.new_zeros(1, h.shape[1])]), torch.tensor(order))


def by_gathering_of_more(h: Tensor, order: Order) -> Tensor:
    return torch.cat([h, h.new_zeros(1, h.shape[1])]).gather(0, torch.tensor(order)[:, None].expand_as(h))


def matrix(h: Tensor, order: Order) -> Tensor:
    return torch.eye(len(order), dtype=h.dtype)[torch.tensor(order)]


def by_a_product_on_the_right(h: Tensor, order: Order) -> Tensor:
    return (h.T @ matrix(h, order).T).T


def by_a_product_that_has_a_gradient(h: Tensor, order: Order) -> Tensor:
    return (matrix(h, order) * h.mean(1).sigmoid()) @ h


def by_a_product_with_more_rows(h: Tensor, order: Order) -> Tensor:
    rows = torch.cat([h, h.new_zeros(1, h.shape[1])])
    return torch.cat([matrix(h, order), h.new_zeros(len(h), 1)], 1) @ rows


PRODUCTS = [by_a_product_on_the_right, by_a_product_that_has_a_gradient, by_a_product_with_more_rows]
INDEXED = [with_a_spare_row, by_selecting_of_more, by_embedding_of_more, by_gathering_of_more]


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("ordered", [*INDEXED, *PRODUCTS, parts, rows, of_each, of_each_twice])
@pytest.mark.parametrize("way", ["monitor", "report"])
def test_each_sample_has_its_own_number(ordered: Callable[[Tensor, Order], Tensor], n: int, way: str) -> None:
    """The sums over a batch would not show that two samples were exchanged."""
    loss_fn = nn.CrossEntropyLoss()
    for seed in range(3):
        torch.manual_seed(seed)
        model, batches = Ordered(ordered).double(), 5
        x, y = torch.randn(batches, n, 4, dtype=torch.float64), torch.randint(3, (batches, n))
        right = [sample_gradients(model, loss_fn, *batch) for batch in zip(x, y, strict=True)]
        if way == "monitor":
            with FisherMonitor(model, per_sample=True) as found:
                for inputs, targets in zip(x, y, strict=True):
                    loss_fn(model(inputs), targets).backward()
        else:
            batches_ = list(zip(x, y, strict=True))
            found = fisher_results(model, loss_fn, batches_, progress=False, verify=False, per_sample=True)
        for name in right[0]:
            expected = torch.cat([gradients[name].flatten(1).square().sum(1) for gradients in right])
            assert list(found.per_sample[name]) == pytest.approx(expected.tolist(), rel=1e-8), name
