"""What is remembered where a model puts samples into another order: that which comes back in the same order, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from oracles import assert_equal, per_sample_squared_norms, total, trace
from torch_secorder import FisherMonitor
from torch_secorder.batch_axis.derivation import Derivation
from torch_secorder.batch_axis.knowledge import ModelKnowledge
from torch_secorder.batch_axis.search import SampleSearch
from torch_secorder.graph import orders

N, T = 4, 8  # as many windows along an axis of positions as samples
STEPS = 8


class Ordered(nn.Module):
    """A layer and a scale behind some order of rows, which is undone afterwards.

    Attributes:
        function: from ``[n, t, f]`` to what the layer gets, and the way back.
        mask: what the rows' outputs are multiplied by.
    """

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]]) -> None:
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.scale, self.function, self.mask = nn.Parameter(torch.rand(3) + 0.5), function, torch.ones(1)

    def forward(self, x: Tensor) -> Tensor:
        rows, back = self.function(self.first(x))
        return self.head(back(self.layer(rows * self.scale).tanh() * self.mask))


def windows(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Positions are rolled, and folded into the batch by windows of two."""

    def back(h: Tensor) -> Tensor:
        return h.reshape(-1, T, 3).roll(1, 1)

    return x.roll(-1, 1).reshape(-1, 2, 3), back


SHUFFLED = torch.randperm(N * T, generator=torch.Generator().manual_seed(0))


def by_constant(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Rows are shuffled, so that only a list tells the samples; one sample alone has its rows in the same order."""
    order = SHUFFLED[: x.shape[0] * T] if x.shape[0] == N else torch.arange(len(x) * T)
    return x.reshape(-1, 3)[order], lambda h: h[order.argsort()].reshape(-1, T, 3)


def by_data(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Rows are sorted by what is in them, as a router does."""
    order = x.detach().reshape(-1, 3)[:, 0].argsort()
    return x.reshape(-1, 3)[order], lambda h: h[order.argsort()].reshape(-1, T, 3)


def rolled_by_data(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Samples are rolled by as much as their data says."""
    shift = int(x.detach()[:, 0, 0].argmax())
    return x.roll(shift, 0), lambda h: h.roll(-shift, 0)


def numbers_of(model: nn.Module, searches: list[int], batches: list[Tensor]) -> list[int]:
    """Steps that are exact; how many searches each of them made."""
    loss_fn, made = nn.MSELoss(reduction="sum"), []
    with FisherMonitor(model, reduction="sum") as monitor:
        for x in batches:
            y = torch.zeros(len(x), T, 2, dtype=x.dtype)
            monitor.reset()
            searches.clear()
            loss_fn(model(x), y).backward()
            made.append(len(searches))
            expected = total(trace(per_sample_squared_norms(model, loss_fn, x, y), "sum"))
            assert_equal(monitor.trace, expected, expected)
    return made


def batches(count: int = STEPS, n: int = N) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, T, 3, dtype=torch.float64, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("function", [windows, by_constant])
def test_the_same_order_is_remembered(
    function: Callable[[Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]], searches: list[int]
) -> None:
    """It is examined again in the 1st, 2nd, 3rd and 5th graph."""
    made = numbers_of(Ordered(function).double(), searches, batches())
    assert [step for step, count in enumerate(made, start=1) if count] == [1, 2, 3, 5]


@pytest.fixture
def nothing_is_derived(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes are made wherever nothing is remembered."""
    monkeypatch.setattr(SampleSearch, "_underived", lambda self, wanted, derivation: wanted)
    monkeypatch.setattr(SampleSearch, "_without_silent", lambda self, wanted: wanted)
    monkeypatch.setattr(Derivation, "without_contradicted", lambda self, wanted, found: found)


def test_an_order_that_data_decides_is_never_remembered(searches: list[int], nothing_is_derived: None) -> None:
    assert all(numbers_of(Ordered(by_data).double(), searches, batches()))


def test_an_order_that_data_decides_is_derived(searches: list[int]) -> None:
    """Passes show whether that is right in the 1st, 2nd, 3rd and 5th graph."""
    made = numbers_of(Ordered(by_data).double(), searches, batches())
    assert [step for step, count in enumerate(made, start=1) if count] == [1, 2, 3, 5]


def counts_of_rolls(searches: list[int]) -> tuple[list[int], list[bool]]:
    """How often each of 12 steps was searched, and whether it had another order than the one before."""
    model = Ordered(rolled_by_data).double()
    shifts = [int(model.first(x)[:, 0, 0].argmax()) for x in batches(12)]
    assert len(set(shifts)) > 2
    changed = [now != before for before, now in zip([-1, *shifts], shifts, strict=False)]
    return numbers_of(model, searches, batches(12)), changed


def test_each_roll_is_an_order_of_its_own(searches: list[int], nothing_is_derived: None) -> None:
    counts, changed = counts_of_rolls(searches)
    assert all(count for count, other in zip(counts, changed, strict=True) if other)


def test_another_roll_is_derived(searches: list[int]) -> None:
    counts, changed = counts_of_rolls(searches)
    assert sum(changed) > 6
    assert any(not count for count, other in zip(counts, changed, strict=True) if other)


def test_another_constant_is_another_order(searches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Ordered(by_constant).double()
    numbers_of(model, searches, batches())
    monkeypatch.setattr(f"{__name__}.SHUFFLED", SHUFFLED.flip(0))
    assert numbers_of(model, searches, batches(1)) != [0]


def with_silent_rows() -> Ordered:
    """A row without a gradient fits any sample, and may have one later."""
    model = Ordered(by_constant).double()
    model.mask = torch.ones(N * T, 1, dtype=torch.float64)
    model.mask[::3] = 0
    return model


def test_a_row_that_has_shown_nothing_is_looked_for(searches: list[int], nothing_is_derived: None) -> None:
    made = [0]
    model, loss_fn = with_silent_rows(), nn.MSELoss(reduction="sum")
    with FisherMonitor(model, reduction="sum"):
        for x in batches(6):
            searches.clear()
            loss_fn(model(x), torch.zeros(N, T, 2, dtype=x.dtype)).backward()
            made.append(len(searches))
    assert all(made[1:])


def test_a_row_that_has_shown_nothing_is_derived(searches: list[int]) -> None:
    """The nodes tell whose it is, so that its gradient is that sample's as soon as there is one."""
    model, y = with_silent_rows(), torch.zeros(N, T, 2, dtype=torch.float64)
    loss_fn = nn.MSELoss(reduction="sum")
    with FisherMonitor(model, reduction="sum", per_sample=True) as monitor:
        for step, x in enumerate(batches(8), start=1):
            model.mask = model.mask if step < 7 else torch.ones(N * T, 1, dtype=torch.float64)
            monitor.reset()
            searches.clear()
            loss_fn(model(x), y).backward()
            assert not searches or step in (1, 2, 3, 5)
            # A sample alone has its rows in the order of their positions, and its mask in the same.
            order = SHUFFLED.argsort().view(N, T)
            for sample in range(N):
                alone = Ordered(by_constant).double()
                alone.load_state_dict(model.state_dict())
                alone.mask = model.mask[order[sample]]
                expected = total(per_sample_squared_norms(alone, loss_fn, x[sample, None], y[sample, None]))
                found = torch.tensor(monitor.per_sample.to_numpy()[sample].sum())
                assert_equal(found, expected.sum(), expected.sum())


@pytest.mark.parametrize("limit", [0, 2**20])
def test_large_indices_are_not_compared(
    limit: int, searches: list[int], nothing_is_derived: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orders, "LARGEST_INDEX", limit)
    made = numbers_of(Ordered(by_constant).double(), searches, batches(4))
    assert (made[3] == 0) == (limit > 0)


def test_of_each_kind_the_latest_order_is_kept() -> None:
    knowledge = ModelKnowledge()
    first = knowledge.placements_in_order(1, "a")
    assert first.keeps_lists
    assert knowledge.placements_in_order(1, "a") is first
    assert knowledge.placements_in_order(2, "b") is not first
    assert knowledge.placements_in_order(1, "a") is first
    knowledge.placements_in_order(1, "b")
    assert knowledge.placements_in_order(1, "a") is not first
    for fingerprint in range(1000):
        last = knowledge.placements_in_order(fingerprint, "a")
    assert len(knowledge._in_order) <= 65
    knowledge.forget_shapes()
    assert knowledge.placements_in_order(999, "a") is not last
