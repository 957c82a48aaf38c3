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


def by_a_sum(h: Tensor, order: Order) -> Tensor:
    return (matrix(h, order).T[:, :, None] * h[:, None]).sum(0)


def places(order: Order) -> Order:
    """Where each sample goes. They are taken in turn, so that what is taken shows nothing of the order."""
    return [order.index(n) for n in range(len(order))]


def by_assignment(h: Tensor, order: Order) -> Tensor:
    out = torch.zeros_like(h)
    for n, to in enumerate(places(order)):
        out[to] = h[n]
    return out


def by_adding_in_place(h: Tensor, order: Order) -> Tensor:
    out = torch.zeros_like(h)
    for n, to in enumerate(places(order)):
        out[to : to + 1] += h[n : n + 1]
    return out


def by_padding(h: Tensor, order: Order) -> Tensor:
    padded = [nn.functional.pad(h[n : n + 1], (0, 0, to, len(h) - 1 - to)) for n, to in enumerate(places(order))]
    return torch.stack(padded).sum(0)


def by_slice_scatter(h: Tensor, order: Order) -> Tensor:
    out = torch.zeros_like(h)
    for n, to in enumerate(places(order)):
        out = out.slice_scatter(h[n : n + 1], 0, to, to + 1)
    return out


def by_select_scatter(h: Tensor, order: Order) -> Tensor:
    out = torch.zeros_like(h)
    for n, to in enumerate(places(order)):
        out = out.select_scatter(h[n], 0, to)
    return out


def by_where(h: Tensor, order: Order) -> Tensor:
    out = torch.zeros_like(h)
    for n, to in enumerate(places(order)):
        out = torch.where((torch.arange(len(h)) == to)[:, None], h[n], out)
    return out


PLACED = [by_a_sum, by_assignment, by_adding_in_place, by_padding, by_slice_scatter, by_select_scatter, by_where]


class PutBack(nn.Module):
    """A layer whose inputs, which need no gradient, are sorted in some batches, and whose outputs are put back."""

    def __init__(self, ordered: Callable[[Tensor, Order], Tensor]) -> None:
        super().__init__()
        self.layer, self.last, self.ordered = nn.Linear(4, 5), nn.Linear(5, 3), ordered

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort().tolist()
        z = self.layer(x[order]).tanh()
        return self.last(self.ordered(z, [order.index(n) for n in range(len(order))]))


@pytest.mark.parametrize("ordered", PLACED)
def test_samples_that_are_put_back_one_by_one(ordered: Callable[[Tensor, Order], Tensor]) -> None:
    """The first batches are sorted already, so that nothing shows in them how others are put back."""
    torch.manual_seed(0)
    model, loss_fn = PutBack(ordered).double(), nn.CrossEntropyLoss()
    x, y = torch.randn(9, 5, 4, dtype=torch.float64), torch.randint(3, (9, 5))
    for early in x[:5]:
        early.copy_(early[early[:, 0].argsort()])
    right = [sample_gradients(model, loss_fn, *batch) for batch in zip(x, y, strict=True)]
    with FisherMonitor(model, per_sample=True) as found:
        for inputs, targets in zip(x, y, strict=True):
            loss_fn(model(inputs), targets).backward()
    for name in right[0]:
        expected = torch.cat([gradients[name].flatten(1).square().sum(1) for gradients in right])
        assert list(found.per_sample[name]) == pytest.approx(expected.tolist(), rel=1e-8), name


PRODUCTS = [by_a_product_on_the_right, by_a_product_that_has_a_gradient, by_a_product_with_more_rows]
INDEXED = [with_a_spare_row, by_selecting_of_more, by_embedding_of_more, by_gathering_of_more]


@pytest.mark.parametrize("ordered", [*INDEXED, *PRODUCTS, parts, rows, of_each, of_each_twice])
@pytest.mark.parametrize("way", ["monitor", "report"])
def test_each_sample_has_its_own_number(ordered: Callable[[Tensor, Order], Tensor], way: str) -> None:
    """The sums over a batch would not show that two samples were exchanged."""
    loss_fn = nn.CrossEntropyLoss()
    for seed, n in enumerate((2, 3, 4)):
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
