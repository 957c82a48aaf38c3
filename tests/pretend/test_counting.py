"""What the pretend device counts, and what it lets nobody read too early."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import pretend
from pretend.operations import BLOCK, BLOCKS_OF_A_KERNEL, TENSORS_OF_A_KERNEL
from torch_secorder.per_sample import _base

HERE = {"device": "pretend"}
SQUARE = torch.tensor([[2.0, 1.0], [1.0, 3.0]])


def put(x: Tensor) -> None:
    x[x > 1] = 0.0


def put_at(x: Tensor) -> None:
    x[torch.tensor([0])] = 0.0


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0, 0].item(),
    "bool": lambda x: bool(x.any()),
    "float": lambda x: float(x.sum()),
    "tolist": lambda x: x.tolist(),
    "repr": repr,
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 1),
    "unique": lambda x: x.unique(),
    "unique_consecutive": lambda x: x.flatten().unique_consecutive(),
    "bincount": lambda x: x.long().flatten().bincount(),
    "repeat_interleave": lambda x: x.flatten().repeat_interleave(x.long().flatten()),
    "masked_select": lambda x: x.masked_select(x > 1),
    "a mask as index": lambda x: x[x > 1],
    "a mask to put by": put,
    "an index of the host": lambda x: x[torch.tensor([0])],
    "an index of the host to put by": put_at,
    "a copy to the host": lambda x: x.cpu(),
    "a copy into the host": lambda x: torch.empty(2, 2).copy_(x),
    "a copy to the device": lambda _: torch.ones(2).to("pretend"),
    "a copy into the device": lambda x: x.copy_(torch.ones(2, 2)),
    "numbers of Python's": lambda _: torch.tensor([1.0, 2.0], **HERE),
    "a factorization": torch.linalg.cholesky,
    "a solution": lambda x: torch.linalg.solve(x, x),
    "an inverse": torch.linalg.inv,
    "singular values": torch.linalg.svdvals,
    "eigenvalues": torch.linalg.eigvalsh,
    "a determinant": torch.linalg.det,
    "all that is queued": lambda _: torch.pretend.synchronize(),
}
NO_WAITS: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda x: (x @ x).relu().sum(),
    "an index of the device": lambda x: x[torch.zeros(1, dtype=torch.long, **HERE)],
    "a mask filled": lambda x: x.masked_fill_(x > 1, 0.0),
    "a choice": lambda x: torch.where(x > 1, x, 0.0),
    "a sort": lambda x: x.sort(),
    "numbers made there": lambda x: torch.full_like(x, 3.0),
    "lengths known": lambda x: x[0].repeat_interleave(2),
    "a copy that does not block": lambda x: x.to("cpu", non_blocking=True),
    "a copy to the device that does not block": lambda _: torch.ones(2).to("pretend", non_blocking=True),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_host_waits(name: str) -> None:
    x = pretend.moved(SQUARE)
    with pretend.counting() as counts:
        WAITS[name](x)
    assert sum(counts.waits.values()) >= 1
    assert all(place.endswith(" user") for place in counts.places)


@pytest.mark.parametrize("name", NO_WAITS)
def test_the_host_does_not_wait(name: str) -> None:
    x = pretend.moved(SQUARE)
    with pretend.counting() as counts:
        NO_WAITS[name](x)
    assert not counts.waits


def test_a_wait_is_counted_at_the_line_of_the_library_that_asked() -> None:
    norms, lost = torch.ones(2, **HERE), _base.Dense(torch.ones(2, 3, **HERE))
    with pretend.counting() as counts:
        _base.recompute_cancelled(norms, 2 * norms, lost)
    lines, start = inspect.getsourcelines(_base.recompute_cancelled)
    asked = start + next(i for i, line in enumerate(lines) if "bool(" in line)
    assert list(counts.places) == [f"_local_scalar_dense per_sample/_base.py:{asked}"]


@pytest.mark.parametrize("value", [1.0, 7, True, 1j])
def test_a_copy_that_was_not_awaited_holds_nonsense(value: complex) -> None:
    x = torch.full((3,), value, **HERE)
    copies = x.to("cpu", non_blocking=True), torch.empty(3, dtype=x.dtype).copy_(x, non_blocking=True)
    right = torch.full((3,), value)
    assert not any((copied == right).any() for copied in copies)
    x.zero_()  # queued after the copies
    torch.pretend.synchronize()
    assert all(torch.equal(copied, right) for copied in copies)


def test_any_wait_is_for_all_copies_before_it() -> None:
    x = torch.ones(3, **HERE)
    copied = x.to("cpu", non_blocking=True)
    x.sum().item()
    assert copied.tolist() == [1, 1, 1]


def test_views_launch_nothing_and_operations_one_kernel_each() -> None:
    x = torch.ones(4, 3, **HERE)
    with pretend.counting() as counts:
        x.t()[1:].unsqueeze(0).expand(2, 2, 4).reshape(2, 8)  # the last is a copy
        x.add_(1).mul(2)
    assert counts.launches == {"clone": 1, "add_": 1, "mul": 1}


@pytest.mark.parametrize(
    ("tensors", "kernels"),
    [
        ([torch.ones(5)] * 3, 1),
        ([torch.ones(5)] * (TENSORS_OF_A_KERNEL[1] + 1), 2),
        ([torch.ones(BLOCK * BLOCKS_OF_A_KERNEL + 1)], 2),
        ([torch.ones(5), torch.ones(5).double()], 2),  # of two dtypes: one by one
        ([torch.ones(5, 2).t()] * 3, 3),  # not contiguous: one by one
    ],
)
def test_foreach_calls_count_by_kernels(tensors: list[Tensor], kernels: int) -> None:
    left = [pretend.moved(x) for x in tensors]
    with pretend.counting() as counts:
        torch._foreach_mul(left, left)
    assert counts.launches == {"_foreach_mul": kernels}


def test_foreach_norms_count_a_kernel_for_blocks_and_one_for_what_they_come_to() -> None:
    tensors = [torch.ones(3, **HERE)] * 2
    with pretend.counting() as counts:
        torch._foreach_norm(tensors)
    assert counts.launches == {"_foreach_norm": 2}


def test_bytes_are_counted_while_tensors_live() -> None:
    gc.collect()
    before = pretend.live_bytes(), pretend.live_bytes(1)
    with pretend.counting() as counts:
        x = torch.ones(256, **HERE)
        view = x[:10]
        y = torch.ones(64, device="pretend:1")
        assert (pretend.live_bytes() - before[0], pretend.live_bytes(1) - before[1]) == (1024, 256)
        x + x  # not kept
        del x
        assert pretend.live_bytes() - before[0] == 1024  # the view keeps it
        del view, y
        assert (pretend.live_bytes(), pretend.live_bytes(1)) == before
    assert counts.peak == 2048


def test_what_a_graph_keeps_counts() -> None:
    gc.collect()
    w = torch.ones(256, requires_grad=True, **HERE)
    before = pretend.live_bytes()
    out = (w.exp() * 1).sum()
    assert pretend.live_bytes() - before == 1024 + 4  # what exp saved, and the sum
    out.backward()
    del out
    assert pretend.live_bytes() - before == 1024  # w.grad


def test_blocks_may_be_nested() -> None:
    x = torch.ones(4, **HERE)
    with pretend.counting() as outer:
        x + x
        with pretend.counting() as inner:
            torch.ones(1024, **HERE)
        x * x
    assert (sum(outer.launches.values()), sum(inner.launches.values())) == (3, 1)
    assert inner.peak == outer.peak == 4096
