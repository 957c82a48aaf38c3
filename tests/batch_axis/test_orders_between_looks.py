"""Trap 22 in monitors: samples change places only in steps between those in which a monitor looks where they are.

Every program here puts samples where its data say, through an index that its graph shows or without one. In the 1st, 2nd, 3rd,
5th, 9th and 17th of thirty steps, in which marks may be sent through the graph, the data say that the samples stay; in all others
they change places. Each step's numbers are those of a loop over samples in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracles import assert_equal, per_sample_squared_norms, total, trace
from torch_secorder import FisherMonitor
from traps.exactness import numbers

N, WIDTH, STEPS = 6, 4, 30
LOOKS = (1, 2, 3, 5, 9, 17)
Way = Callable[[Tensor, Tensor], Tensor]  # of rows, and of where each of them comes from


def matrix(order: Tensor, rows: int = 0) -> Tensor:
    """The matrix that puts rows into an order."""
    return F.one_hot(order, rows or len(order)).double()


def swapped(order: Tensor) -> Tensor:
    """``[n, 1]``: whether a row changes places with the other one of its pair."""
    return (order != torch.arange(len(order)))[:, None]


def flipped(z: Tensor) -> Tensor:
    """The two rows of each pair exchanged, whatever the data are."""
    return z.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def rolled(z: Tensor) -> Tensor:
    return z.unflatten(0, (-1, 2)).roll(1, 1).flatten(0, 1)


def indexed(z: Tensor) -> Tensor:
    return z[torch.arange(len(z)).view(-1, 2).flip(1).flatten()]


def split(z: Tensor) -> Tensor:
    first, second = z.unflatten(0, (-1, 2)).unbind(1)
    return torch.stack((second, first), 1).flatten(0, 1)


def on_diagonal(column: Tensor) -> Tensor:
    """A column that was put on the diagonal of a matrix, whose rows are summed."""
    return torch.zeros(len(column), len(column), dtype=column.dtype).diagonal_scatter(column).sum(1)


def put_one_by_one(z: Tensor, order: Tensor, put: Callable[[Tensor, int, Tensor], Tensor], before: int = 1) -> Tensor:
    """Rows put into a buffer that has more rows than there are, so that no size of it counts samples."""
    whole = torch.zeros(before + len(z), z.shape[1], dtype=z.dtype)
    for place, row in enumerate(order.tolist()):
        whole = put(whole, before + place, z[row])
    return whole[before:]


def assigned(whole: Tensor, place: int, row: Tensor) -> Tensor:
    whole[place] = row
    return whole


def added(whole: Tensor, place: int, row: Tensor) -> Tensor:
    whole[place : place + 1] += row
    return whole


def by_pads(z: Tensor, order: Tensor) -> Tensor:
    n = len(order)
    return torch.stack([F.pad(z[row][None], (0, 0, at, n - at)) for at, row in enumerate(order.tolist())]).sum(0)[:n]


def with_a_row_more(z: Tensor) -> Tensor:
    return torch.cat((torch.zeros(1, z.shape[1], dtype=z.dtype), z))


def dispatched(z: Tensor, order: Tensor) -> Tensor:
    """Rows go to places in a buffer for each of three experts, which has a place more than it needs, and back."""
    n = len(order)
    places = matrix(torch.arange(n), n + 1).expand(3, n, n + 1)
    kept = F.one_hot(torch.arange(n) % 3, 3).T[..., None]  # [experts, n, 1]
    buffers = (places * kept).transpose(1, 2) @ (matrix(order) @ z).expand(3, n, -1)
    return ((places * kept) @ buffers).sum(0)


ORDERS: dict[str, Way] = {
    "a matrix": lambda z, order: matrix(order) @ z,
    "einsum": lambda z, order: torch.einsum("ij,jd->id", matrix(order), z),
    "einsum of three axes": lambda z, order: torch.einsum("eij,jd->eid", matrix(order).expand(2, -1, -1), z)[1],
    "a product that is broadcast": lambda z, order: (matrix(order)[:, None] @ z)[:, 0],
    "a matrix on the right": lambda z, order: (z.T @ matrix(order).T).T,
    "one column after the other": lambda z, order: torch.stack([matrix(order) @ column for column in z.T], 1),
    "a mean": lambda z, order: (matrix(order)[..., None] * z).mean(1) * len(z),
    "a linear layer on transposed rows": lambda z, order: F.linear(z.T, matrix(order)).T,
    "a convolution": lambda z, order: F.conv1d(z[None], matrix(order)[..., None])[0],
    "hard attention": lambda z, order: (1e4 * (matrix(order) - 1)).softmax(1) @ z,
    "buffers of experts": dispatched,
    "an embedding bag": lambda z, order: F.embedding_bag(order[:, None], z, mode="sum"),
    "a bag without rows": lambda z, order: F.embedding(order, z),
    "assignment": lambda z, order: put_one_by_one(z, order, assigned),
    "addition in place": lambda z, order: put_one_by_one(z, order, added),
    "slice_scatter": lambda z, order: put_one_by_one(
        z, order, lambda whole, place, row: whole.slice_scatter(row[None], 0, place, place + 1)
    ),
    "select_scatter": lambda z, order: put_one_by_one(
        z, order, lambda whole, at, row: whole.select_scatter(row, 0, at)
    ),
    "index_copy into more rows": lambda z, order: torch.zeros(len(z) + 1, z.shape[1], dtype=z.dtype).index_copy(
        0, order.argsort() + 1, z
    )[1:],
    "index_put into more rows": lambda z, order: torch.zeros(len(z) + 1, z.shape[1], dtype=z.dtype).index_put(
        (order.argsort() + 1,), z
    )[1:],
    "index of more rows": lambda z, order: with_a_row_more(z)[order + 1],
    "gather of more rows": lambda z, order: with_a_row_more(z).gather(0, (order + 1)[:, None].expand_as(z)),
    "split of more rows": lambda z, order: torch.cat([with_a_row_more(z).split(1)[row + 1] for row in order.tolist()]),
    "as_strided": lambda z, order: torch.stack(
        [with_a_row_more(z).as_strided(z.shape[1:], (1,), (row + 1) * z.shape[1]) for row in order.tolist()]
    ),
    "put": lambda z, order: torch.zeros_like(z).put(torch.arange(z.numel()).view(z.shape)[order.argsort()], z),
    "pads": by_pads,
    "where, one by one": lambda z, order: sum(
        torch.where((torch.arange(len(z)) == at)[:, None], z[row], 0.0) for at, row in enumerate(order.tolist())
    ),
    "a diagonal": lambda z, order: torch.stack([(torch.diag_embed(column)[:, order]).sum(0) for column in z.T], 1),
    "blocks that are multiplied": lambda z, order: torch.kron(torch.ones(1, 1).double(), matrix(order)).mm(z),
    "sorted by place": lambda z, order: z.take_along_dim(order[:, None], 0),
}

SWAPS: dict[str, Way] = {
    "where": lambda z, order: torch.where(swapped(order), flipped(z), z),
    "where and a roll": lambda z, order: torch.where(swapped(order), rolled(z), z),
    "where and a constant index": lambda z, order: torch.where(swapped(order), indexed(z), z),
    "where and parts": lambda z, order: torch.where(swapped(order), split(z), z),
    "masked_fill": lambda z, order: z.masked_fill(swapped(order), 0) + flipped(z).masked_fill(~swapped(order), 0),
    "index_fill": lambda z, order: (
        z.index_fill(0, swapped(order)[:, 0].nonzero()[:, 0], 0)
        + flipped(z).index_fill(0, (~swapped(order)[:, 0]).nonzero()[:, 0], 0)
    ),
    "products with a mask": lambda z, order: z * ~swapped(order) + flipped(z) * swapped(order),
    "a lerp": lambda z, order: z.lerp(flipped(z), swapped(order).double()),
    "a linear combination": lambda z, order: z + swapped(order) * (rolled(z) - z),
    "the larger one": lambda z, order: torch.maximum(
        z.masked_fill(swapped(order), -1e3), flipped(z).masked_fill(~swapped(order), -1e3)
    ),
    "masked_scatter": lambda z, order: z.masked_scatter(swapped(order), flipped(z)[swapped(order)[:, 0]]),
    "a scatter on the diagonal": lambda z, order: (
        z
        + torch.stack(
            [
                torch.zeros(len(z), len(z)).double().diagonal_scatter(column).sum(1)
                for column in ((flipped(z) - z) * swapped(order)).T
            ],
            1,
        )
    ),
    "a rectifier": lambda z, order: z + F.relu(flipped(z) - z + 1e3 * (2 * swapped(order) - 1)) - 1e3 * swapped(order),
}


def shifted_by_pads(z: Tensor, shift: int) -> Tensor:
    """The rows rolled by so much, by pads that keep the size."""
    return F.pad(z, (0, 0, shift, -shift)) + F.pad(z, (0, 0, shift - len(z), len(z) - shift))


class Moved(nn.Module):
    """A layer whose rows are moved before and after it, if there are several."""

    def __init__(self, there: Way, back: Way) -> None:
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.there, self.back = there, back

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return (
            self.head(h + self.back(self.layer(self.there(h, x)).tanh(), x))
            if len(x) > 1
            else self.head(h + self.layer(h).tanh())
        )


def batches(stays: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """What each step gets; in those of ``LOOKS`` it is what ``stays`` makes of it."""
    drawn = [torch.randn(N, 3).double() for _ in range(STEPS)]
    return [stays(x) if step in LOOKS else x for step, x in enumerate(drawn, start=1)]


def require_exact(model: nn.Module, inputs: list[Tensor], **options: Any) -> None:
    """Each step's numbers are those of a loop over samples."""
    model = model.double()
    y = torch.randn(N, 2).double()
    with FisherMonitor(model, per_sample=True, **options) as monitor:
        for x in inputs:
            monitor.reset()
            numbers(model(x), y).backward()
            expected = per_sample_squared_norms(model, numbers, x, y)
            everything = N * total(trace(expected))
            found = torch.from_numpy(monitor.per_sample.to_numpy(copy=True))
            assert_equal(found, torch.stack(list(expected.values()), 1), everything, torch.float64)


@pytest.mark.parametrize("way", ORDERS)
def test_trap_22_an_order_between_looks(way: str) -> None:
    function = ORDERS[way]
    model = Moved(lambda z, x: function(z, x[:, 0].argsort()), lambda z, x: function(z, x[:, 0].argsort().argsort()))
    require_exact(model, batches(lambda x: x[x[:, 0].argsort()]))


def pairs(x: Tensor) -> Tensor:
    """Where each row comes from, if the smaller one of each pair goes first."""
    order = x[:, 0].view(-1, 2).argsort(1) + torch.arange(0, len(x), 2)[:, None]
    return order.flatten()


@pytest.mark.parametrize("way", SWAPS)
def test_trap_22_pairs_that_are_swapped_between_looks(way: str) -> None:
    function = SWAPS[way]
    model = Moved(lambda z, x: function(z, pairs(x)), lambda z, x: function(z, pairs(x)))
    require_exact(model, batches(lambda x: x[pairs(x)]))


def test_trap_22_pads_that_keep_the_size() -> None:
    def shift(x: Tensor) -> int:
        return int(x[:, 0].argmax())

    model = Moved(
        lambda z, x: shifted_by_pads(z, shift(x)), lambda z, x: shifted_by_pads(z, (len(x) - shift(x)) % len(x))
    )
    require_exact(model, batches(lambda x: x.roll(-shift(x), 0)))
