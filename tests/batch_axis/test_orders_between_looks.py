"""Trap 22 in monitors: samples change places only in steps between those in which a monitor looks where they are.

Every program here puts samples where its data say, through an index that its graph shows or without one. In the 1st, 2nd, 3rd,
5th, 9th and 17th of eighteen steps, in which marks may be sent through the graph, the data say that the samples stay; in all
others they change places. Each step's numbers are those of a loop over samples in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracles import assert_equal, per_sample_squared_norms, total, trace
from permuted import Permuted
from torch_secorder import FisherMonitor, fisher_report
from torch_secorder.errors import UnsupportedError
from traps.exactness import numbers

N, WIDTH, STEPS = 6, 4, 18
LOOKS = (1, 2, 3, 5, 9, 17)
Way = Callable[[Tensor, Tensor], Tensor]  # of rows, and of where each of them comes from


def matrix(order: Tensor, columns: int = 0) -> Tensor:
    """The matrix that takes rows by their numbers, from as many as there are numbers or from so many."""
    return F.one_hot(order, columns or len(order)).double()


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


def written_by_index(z: Tensor, order: Tensor) -> Tensor:
    """Rows that an index puts into a part of a buffer. Torch's node for that looks like that of any write."""
    whole = torch.zeros(len(z), z.shape[1] + 2, dtype=z.dtype)
    whole[:, 1:-1].index_put_((order.argsort(),), z)
    return whole[:, 1:-1]


def written_by_rows(z: Tensor, order: Tensor) -> Tensor:
    """A part of a buffer that is multiplied in place by a matrix of the data's, which is a write like any other, too."""
    whole = torch.zeros(len(z), z.shape[1] + 2, dtype=z.dtype)
    whole[:, 1:-1].addmm_(matrix(order), z)
    return whole[:, 1:-1]


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
    "an index into a view": written_by_index,
    "a product into a view": written_by_rows,
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
    of_all = per_sample_squared_norms(model, numbers, torch.cat(inputs), y.repeat(len(inputs), 1))
    of_steps = torch.stack(list(of_all.values()), 1).split(N)
    with FisherMonitor(model, per_sample=True, **options) as monitor:
        for x, expected in zip(inputs, of_steps, strict=True):
            monitor.reset()
            numbers(model(x), y).backward()
            found = torch.from_numpy(monitor.per_sample.to_numpy(copy=True))
            assert_equal(found, expected, expected.sum(), torch.float64)


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


def is_turned(x: Tensor) -> bool:
    return bool(x[0, 0] > x[-1, 0])


def laid_out(z: Tensor, x: Tensor, rows: int) -> Tensor:
    """The samples as they lie in memory, where the data say whether rows or columns of them lie there in turn."""
    layout = torch.channels_last if is_turned(x) else torch.contiguous_format
    lying = z.T.view(WIDTH, rows, N // rows, 1).clone(memory_format=layout)
    return lying.as_strided((WIDTH, N), (N, 1)).T


def halves_written(z: Tensor, x: Tensor) -> Tensor:
    """The halves of the samples, written into a transposed view at places that the data say."""
    half, made = N // 2, torch.zeros_like(z)
    at = half if is_turned(x) else 0
    made.T[:, at : at + half].copy_(z[:half].T)
    made.T[:, half - at : N - at].copy_(z[half:].T)
    return made


def put_by_a_mask(z: Tensor, x: Tensor) -> Tensor:
    """The samples in turn where a mask is true, from the first row or from the middle, and the rows behind the last in front."""
    at = N // 2 if is_turned(x) else 0
    mask = (torch.arange(2 * N) >= at) & (torch.arange(2 * N) < at + N)
    return z.new_zeros(2 * N, WIDTH).masked_scatter(mask[:, None].expand(2 * N, WIDTH), z).unflatten(0, (2, N)).sum(0)


TURNS: dict[str, tuple[Way, Way]] = {
    "views of memory": (lambda z, x: laid_out(z, x, 2), lambda z, x: laid_out(z, x, 3)),
    "writes into a transposed view": (halves_written, halves_written),
    "a mask": (put_by_a_mask, put_by_a_mask),
}


@pytest.mark.parametrize("way", TURNS)
def test_trap_22_samples_that_lie_elsewhere_in_memory(way: str) -> None:
    require_exact(Moved(*TURNS[way]), batches(lambda x: x.flip(0) if is_turned(x) else x))


class Program(nn.Module):
    """Layers for a program of its own: tokens of samples go through one of two layers, or through a recurrent one.

    Attributes:
        function: the program, of this model, the first layer's output ``[n, t, f]`` and the inputs.
    """

    def __init__(self, function: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.layer, self.other = nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.recurrent, self.head = nn.GRU(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, 2)
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self, self.first(x), x) * self.scale)


def order_of(x: Tensor) -> Tensor:
    return x[:, 0, 0].argsort()


def sorted_and_back(model: Any, h: Tensor, x: Tensor) -> Tensor:
    """Samples are sorted, as by their lengths, for a recurrent layer."""
    order = order_of(x)
    return model.recurrent(h[order])[0][order.argsort()][:, -1]


def packed(model: Any, h: Tensor, x: Tensor) -> Tensor:
    """Sequences of lengths that the data say are packed."""
    lengths = 1 + (x[:, 0, 1] > 0).long() + 2 * (x[:, 0, 2] > 0).long()
    sequence = nn.utils.rnn.pack_padded_sequence(h, lengths, batch_first=True, enforce_sorted=False)
    return nn.utils.rnn.pad_packed_sequence(model.recurrent(sequence)[0], batch_first=True)[0].sum(1)


def in_buckets(model: Any, h: Tensor, x: Tensor) -> Tensor:
    """Samples in the order of their buckets, each of which has a layer of its own."""
    bucket, h = (x[:, 0, 0] > 0).long(), h.mean(1)
    order = bucket.argsort(stable=True)
    parts = h[order].split(bucket.bincount(minlength=2).tolist())
    made = torch.cat([model.layer(parts[0]), model.other(parts[1])])
    return torch.empty_like(h).index_copy(0, order, made).tanh()


def best_tokens(model: Any, h: Tensor, x: Tensor) -> Tensor:
    """The best two tokens of each sample; the others are dropped."""
    index = x[..., 1].topk(2, 1).indices[..., None].expand(-1, -1, WIDTH)
    return torch.zeros_like(h).scatter(1, index, model.layer(h.gather(1, index)).tanh()).sum(1)


def kept_tokens(model: Any, h: Tensor, x: Tensor) -> Tensor:
    """Tokens above some score, in one row for all samples."""
    kept, made = x[..., 1] > 0, torch.zeros_like(h)
    made[kept] = model.layer(h[kept]).tanh()
    return made.sum(1)


def truncated(model: Any, h: Tensor, x: Tensor) -> Tensor:
    """Samples of lengths of their own, one after the other in one row."""
    lengths = (1 + (x[:, 0, 1] > 0).long() + 2 * (x[:, 0, 2] > 0).long()).tolist()
    rows = torch.cat([one[:length] for one, length in zip(h, lengths, strict=True)])
    return torch.stack([part.sum(0) for part in model.layer(rows).tanh().split(lengths)])


def one_by_one(model: Any, h: Tensor, x: Tensor) -> Tensor:
    """A loop over the samples in an order of the data's, which makes the same graph in each batch."""
    made: list[Any] = [None] * len(x)
    for sample in order_of(x).tolist():
        made[sample] = model.layer(h[sample]).tanh().sum(0)
    return torch.stack(made)


def shuffled(model: Any, h: Tensor, x: Tensor) -> Tensor:
    """Samples in an order of the data's are cut into mini-batches, and put back by a matrix."""
    order = order_of(x)
    made = torch.cat([model.layer(part) for part in h.mean(1)[order].chunk(2)])
    return matrix(order).T @ made.tanh()


def chosen_by_a_number(model: Any, h: Tensor, x: Tensor) -> Tensor:
    """A number that is 0 or 1 chooses between the order that is there and its reverse."""
    gate = (x[0, 0, 0] > x[-1, 0, 0]).double()

    def chosen(z: Tensor) -> Tensor:
        return (1 - gate) * z + gate * z.flip(0)

    return chosen(model.layer(chosen(h.mean(1))).tanh())


def one_of_two(model: Any, h: Tensor, x: Tensor) -> Tensor:
    """The same by an index into a stack of both."""
    which = int(x[0, 0, 0] > x[-1, 0, 0])

    def chosen(z: Tensor) -> Tensor:
        return torch.stack((z, z.flip(0)))[which]

    return chosen(model.layer(chosen(h.mean(1))).tanh())


class PermutedByAList(torch.autograd.Function):
    """A user's function, with what it keeps as a list."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, order: Tensor) -> Tensor:
        ctx.order = order.argsort().tolist()
        return z[order]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0][ctx.order], None


class Kept(NamedTuple):
    """How a function keeps how far it rolls rows, and how its backward finds that."""

    keep: Callable[[Any, int, Tensor], None]
    kept: Callable[[Any], int]


class Shift:
    """An object with a number in a list."""

    def __init__(self, shift: int) -> None:
        self.shift = [shift]


def save(context: Any, *saved: Tensor) -> None:
    context.save_for_backward(*saved)


def on_the_diagonal(context: Any) -> int:
    matrix = context.saved_tensors[0]
    return int(matrix[:, 0].argmax())


KEPT = {
    "a number": Kept(
        lambda ctx, shift, z: setattr(ctx, "shift", shift),
        lambda ctx: ctx.shift,
    ),
    "a tuple": Kept(
        lambda ctx, shift, z: setattr(ctx, "shift", (z.shape, (None, shift))),
        lambda ctx: ctx.shift[1][1],
    ),
    "a size": Kept(
        lambda ctx, shift, z: setattr(ctx, "shift", torch.Size([shift])),
        lambda ctx: ctx.shift[0],
    ),
    "a mapping": Kept(
        lambda ctx, shift, z: setattr(ctx, "shift", {"by": {"rows": shift}}),
        lambda ctx: ctx.shift["by"]["rows"],
    ),
    "an object": Kept(
        lambda ctx, shift, z: setattr(ctx, "shift", Shift(shift)),
        lambda ctx: ctx.shift.shift[0],
    ),
    "a tensor": Kept(
        lambda ctx, shift, z: setattr(ctx, "shift", torch.tensor(shift)),
        lambda ctx: int(ctx.shift),
    ),
    "a mapping of tensors": Kept(
        lambda ctx, shift, z: setattr(ctx, "shift", {"z": z, "order": torch.arange(len(z)).roll(shift)}),
        lambda ctx: int(ctx.shift["order"].argmin()),
    ),
    "a saved number": Kept(
        lambda ctx, shift, z: save(ctx, z, torch.tensor(shift)),
        lambda ctx: int(ctx.saved_tensors[1]),
    ),
    "a saved float": Kept(
        lambda ctx, shift, z: save(ctx, torch.tensor(float(shift))),
        lambda ctx: int(ctx.saved_tensors[0]),
    ),
    "a saved matrix": Kept(
        lambda ctx, shift, z: save(ctx, torch.eye(len(z)).roll(shift, 0)),
        on_the_diagonal,
    ),
}


class RolledBy(torch.autograd.Function):
    """A user's function that rolls rows, and keeps by how many in one of these ways."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, shift: int, way: str) -> Tensor:
        ctx.way = way
        KEPT[way].keep(ctx, shift % len(z), z)
        return z.roll(shift, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].roll(-kept_shift(ctx), 0), None, None


def kept_shift(context: Any, ways: tuple[tuple[str, Kept], ...] = tuple(KEPT.items())) -> int:
    return dict(ways)[context.way].kept(context)


class RolledTwice(nn.Module):
    """One layer on rows as they are, and on rows that are rolled before and after it, if there are several."""

    def __init__(self, rolled: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.rolled = rolled

    def forward(self, x: Tensor) -> Tensor:
        h, shift = self.first(x), int(x[:, 0].argmax())
        if len(x) == 1:
            return self.head(self.layer(h) + self.layer(h).tanh())
        return self.head(self.layer(h) + self.rolled(self.layer(self.rolled(h, shift)).tanh(), -shift))


@pytest.mark.parametrize("way", KEPT)
def test_trap_22_a_function_that_keeps_another_value_between_looks(way: str) -> None:
    model = RolledTwice(lambda z, shift: RolledBy.apply(z, shift, way))
    require_exact(model, batches(lambda x: x.roll(-int(x[:, 0].argmax()), 0)))


class Stepped(torch.autograd.Function):
    """A user's function that keeps the number of the step, which has no meaning."""

    steps = 0

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        Stepped.steps += 1
        ctx.step = Stepped.steps
        return z * 1

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 1


def test_trap_22_a_function_that_counts_its_steps() -> None:
    """Each step is looked through anew, which takes longer and is as exact."""
    require_exact(Moved(lambda z, x: Stepped.apply(z), lambda z, x: z), batches(lambda x: x))


class Mutating(torch.autograd.Function):
    """A user's function that changes in its backward what it keeps."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, seen: dict[str, Any]) -> Tensor:
        ctx.seen, ctx.ones = seen, torch.ones_like(z)
        return z * 1

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.seen["calls"].append(len(ctx.seen["calls"]))
        return ctx.ones.mul_(grads[0]), None


def test_a_look_changes_nothing_that_a_function_keeps() -> None:
    seen: dict[str, Any] = {"calls": []}
    require_exact(Moved(lambda z, x: Mutating.apply(z, seen), lambda z, x: z), batches(lambda x: x))
    # The function is in the steps' own passes only, since the loop over samples has one row each time.
    assert seen == {"calls": [*range(STEPS)]}


class Routed(nn.Module):
    """A module that its function keeps, so that nobody can call that function to see what it does."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor, module: nn.Module, order: Tensor) -> Tensor:
            ctx.module, ctx.order = module, order
            return z[order]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return torch.zeros_like(grads[0]).index_copy(0, ctx.order, grads[0]), None, None

    def forward(self, z: Tensor, order: Tensor) -> Tensor:
        return Routed.Function.apply(z, self, order)


def test_trap_22_a_function_that_nobody_can_ask_and_that_keeps_indices_is_refused() -> None:
    routed = Routed()
    model = Moved(
        lambda z, x: routed(z, x[:, 0].argsort()), lambda z, x: routed(z, x[:, 0].argsort().argsort())
    ).double()
    x, y = torch.randn(N, 3).double(), torch.randn(N, 2).double()
    with FisherMonitor(model), pytest.raises(UnsupportedError, match="keeps what can't be copied on ctx"):
        numbers(model(x), y).backward()


def by_functions(model: Any, h: Tensor, x: Tensor) -> Tensor:
    order = order_of(x)
    return PermutedByAList.apply(model.layer(Permuted.apply(h.mean(1), order)).tanh(), order.argsort())


PROGRAMS = [sorted_and_back, packed, in_buckets, best_tokens, kept_tokens, truncated, one_by_one, shuffled]
PROGRAMS += [chosen_by_a_number, one_of_two, by_functions]


def stays(x: Tensor) -> Tensor:
    """The samples sorted, with all tokens kept and all sequences of one length."""
    return torch.cat((x[order_of(x)][..., :1], x[..., 1:].abs()), 2)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_trap_22_programs_whose_orders_change_between_looks(program: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    drawn = [torch.randn(N, 4, 3).double() for _ in range(STEPS)]
    require_exact(Program(program), [stays(x) if step in LOOKS else x for step, x in enumerate(drawn, start=1)])


class LookedUp(nn.Module):
    """Rows that a layer makes of parameters alone, of which each sample takes the one that its data name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.table, self.head = (
            nn.Linear(WIDTH, WIDTH),
            nn.Parameter(torch.randn(N, WIDTH)),
            nn.Linear(WIDTH, 2),
        )

    def forward(self, names: Tensor) -> Tensor:
        return self.head(matrix(names.long(), N) @ self.layer(self.table).tanh())


def test_trap_22_rows_of_a_table_that_others_take_between_looks() -> None:
    names = [torch.arange(N) if step in LOOKS else torch.randint(N, (N,)) for step in range(1, STEPS + 1)]
    require_exact(LookedUp(), names)


class OneFeature(nn.Module):
    """A layer in another order of the samples, all but one of whose features get no gradient, and that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0, 0].argsort(descending=True)
        permutation = torch.eye(len(x), dtype=x.dtype)[order]
        h = self.layer((permutation @ self.layer(x).flatten(1)).view(x.shape))
        h = (permutation.T @ h.flatten(1)).view(x.shape)
        return self.head(h * (x[:, 1:2, :1] > 0) * torch.eye(6, dtype=x.dtype)[0]).mean(1)


@pytest.mark.parametrize("verify", [True, False])
def test_trap_22_one_feature_of_one_sample_has_a_gradient(verify: bool) -> None:
    """A run of neighboring features fits as well as a row does, and no rule takes apart a layer's features."""
    torch.manual_seed(0)
    model, y, loss_fn = OneFeature().double(), torch.tensor([0, 2]), nn.CrossEntropyLoss(reduction="sum")
    for _ in range(4):
        x = torch.randn(2, 6, 6, dtype=torch.float64)
        x[:, 1, 0] = torch.tensor([1.0, -1.0])  # The first sample's gate is open.
        expected = trace(per_sample_squared_norms(model, loss_fn, x, y), "sum")
        found = fisher_report(model, loss_fn, (x, y), progress=False, verify=verify)
        for key, value in expected.items():
            assert_equal(torch.tensor(found.loc[key, "fisher_trace"]), value, total(expected))
