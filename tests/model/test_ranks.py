"""Ranks that hold a model together: one that is alone asks nobody, and what another says is believed.

The group here is torch's fake one, in which nobody answers; a test answers for the other rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from torch_secorder.errors import CoverageError, UnsupportedError
from torch_secorder.model.ranks import REFUSED, Ranks, class_as_written, full_tensor, is_dtensor, refuse_dtensors

Answer = Callable[[Tensor], None]


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """The first of two ranks."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def sharded(*placements: Shard | Replicate) -> Tensor:
    return distribute_tensor(torch.ones(4, 2), init_device_mesh("cpu", (2,)), list(placements or [Shard(0)]))


def answering(monkeypatch: pytest.MonkeyPatch, answer: Answer) -> list[Tensor]:
    """Have the other rank take part in each reduction; what this one said is kept."""
    said: list[Tensor] = []

    def all_reduce(value: Tensor, op: object = None, group: object = None) -> None:
        said.append(value.clone())
        answer(value)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return said


def at_least(*values: int) -> Answer:
    """The other rank's values, of which the larger counts."""

    def answer(value: Tensor) -> None:
        other = torch.zeros_like(value)
        other[: len(values)] = torch.tensor(values)
        torch.maximum(value, other, out=value)

    return answer


# Alone


def test_a_rank_alone_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    said = answering(monkeypatch, at_least(9))
    model = nn.Linear(4, 3)
    ranks = Ranks(model.parameters(), model.parameters())
    assert not ranks.distributed
    assert ranks.counts_samples
    assert ranks.max_over_ranks(3) == 3
    assert ranks.max_each_over_ranks([3, -1, 0]) == [3, -1, 0]
    ranks.require_same("anything", "nothing to do")
    ranks.require_same_norms(torch.ones(2, 3), ["weight", "bias"])
    generator = torch.Generator()
    assert ranks.common_generator(generator) is generator
    with ranks.fail_together():
        pass
    with pytest.raises(ZeroDivisionError), ranks.fail_together():
        raise ZeroDivisionError
    assert not said


def test_tensors_and_modules_of_one_process_are_as_they_are() -> None:
    x, layer = torch.ones(3), nn.Linear(2, 2)
    assert not is_dtensor(x)
    assert full_tensor(x) is x
    assert full_tensor("text") == "text"
    assert class_as_written(layer) is nn.Linear
    refuse_dtensors(layer, "this")


# One of two


@pytest.mark.usefixtures("two_ranks")
def test_a_part_of_a_parameter_is_refused_by_name() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(sharded())
    assert is_dtensor(model.weight)
    assert full_tensor(model.weight).shape == (4, 2)
    with pytest.raises(
        UnsupportedError, match=r"^the plot needs whole parameters, and this rank has a part of 'weight'"
    ):
        refuse_dtensors(model, "the plot")


@pytest.mark.usefixtures("two_ranks")
def test_the_first_rank_counts_the_samples_that_several_compute() -> None:
    ranks = Ranks([sharded()], [sharded()])
    assert ranks.distributed
    assert ranks.counts_samples


def test_another_rank_does_not_count_them_again() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        assert not Ranks([sharded()], [sharded()]).counts_samples
        assert Ranks([sharded()], [torch.ones(4, 2)]).counts_samples, "FSDP's ranks have samples of their own"
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("two_ranks")
def test_the_largest_of_all_ranks_values(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks([sharded()])
    answering(monkeypatch, at_least(5, 1))
    assert ranks.max_over_ranks(3) == 5
    assert ranks.max_over_ranks(7) == 7
    assert ranks.max_each_over_ranks([3, 4]) == [5, 4]
    assert len(ranks.max_each_over_ranks(range(20))) == 20
    assert ranks.max_each_over_ranks([]) == []


@pytest.mark.usefixtures("two_ranks")
def test_a_batch_that_another_rank_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks([sharded()])
    answering(monkeypatch, lambda value: value.fill_(REFUSED))
    with pytest.raises(CoverageError, match=r"another rank.*has refused its batch"):
        ranks.max_over_ranks(1)
    with pytest.raises(CoverageError, match=r"another rank.*has refused its batch"), ranks.fail_together():
        pass


@pytest.mark.usefixtures("two_ranks")
def test_a_batch_that_this_rank_refuses_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks([sharded()])
    said = answering(monkeypatch, at_least(0))
    with pytest.raises(ZeroDivisionError), ranks.fail_together():
        raise ZeroDivisionError
    assert len(said) == 1
    assert (said[0] == REFUSED).all()


@pytest.mark.usefixtures("two_ranks")
def test_ranks_that_would_do_different_things(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks([sharded()])
    answering(monkeypatch, lambda value: None)
    ranks.require_same(["call", "layer"], "give all of them the same")
    answering(monkeypatch, lambda value: value.add_(1))  # whatever this one says, the other says more
    with pytest.raises(CoverageError, match=r"different things: give all of them the same"):
        ranks.require_same(["call", "layer"], "give all of them the same")


@pytest.mark.usefixtures("two_ranks")
def test_ranks_of_the_same_samples_that_find_different_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks([sharded(Replicate())], [sharded(Replicate())])
    norms = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    answering(monkeypatch, lambda value: None)
    ranks.require_same_norms(norms, ["weight", "bias"])

    def larger(bounds: Tensor) -> None:
        """The other rank's bias has a sum of 8, where this one's is 7."""
        bounds[0] = torch.maximum(bounds[0], torch.tensor([3.0, 8.0]))
        bounds[1] = torch.maximum(bounds[1], torch.tensor([-3.0, -8.0]))

    answering(monkeypatch, larger)
    with pytest.raises(CoverageError, match=r"^bias: the ranks.*find different gradients"):
        ranks.require_same_norms(norms, ["weight", "bias"])


@pytest.mark.usefixtures("two_ranks")
def test_ranks_of_the_same_samples_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks([sharded(Replicate())], [sharded(Replicate())])
    answering(monkeypatch, lambda value: value.fill_(2**31 - 1))
    draws = [
        torch.rand(4, generator=ranks.common_generator(torch.Generator().manual_seed(seed))).tolist() for seed in (0, 1)
    ]
    assert draws[0] == draws[1]
