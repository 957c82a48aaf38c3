"""max_memory: the same numbers, from temporaries that take no more than so many bytes together."""

from __future__ import annotations

import weakref
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from modes import ModeInside
from torch_secorder import FisherMonitor, fisher_report
from torch_secorder.errors import ArgumentError
from torch_secorder.model.channels import ChannelSums
from torch_secorder.per_sample import Convolution, Outer, PerSampleGradient, RowSparse, Sum, memory_limit

KIB = 2**10


class Peak(ModeInside):
    """The most bytes that tensors made inside, and not given to it, hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in given | self._seen:
                size = x.untyped_storage().nbytes()
                self._seen.add(key)
                self.bytes += size
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(x.untyped_storage(), self._freed, key, size)
        return result

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.bytes -= size


def rows(n: int, t: int, d: int) -> RowSparse:
    return RowSparse(torch.randint(50, (n, t)), torch.randn(n, t, d), (50, d))


FORMS: dict[str, Any] = {
    "gram": lambda: Outer(torch.randn(4, 1, 96, 300), torch.randn(4, 1, 96, 200), (200, 300)),
    "direct": lambda: Outer(torch.randn(4, 1, 256, 100), torch.randn(4, 1, 256, 120), (120, 100)),
    "direct, groups": lambda: Outer(torch.randn(3, 2, 512, 50), torch.randn(3, 2, 512, 60), (120, 50)),
    "rows": lambda: rows(16, 64, 8),
    "tied": lambda: Sum([rows(4, 32, 8), Outer(torch.randn(4, 1, 64, 8), torch.randn(4, 1, 64, 50), (50, 8))]),
    "convolution": lambda: Convolution(
        *(torch.randn(16, 1, 6, 12, 12), torch.randn(16, 1, 8, 12, 12), (8, 6, 3, 3), [1, 1], [1, 1], [1, 1], 1)
    ),
}


def norms_and_peak(form: PerSampleGradient, budget: int | None) -> tuple[Tensor, int]:
    with Peak() as peak, memory_limit(budget):
        norms = form.squared_norm()
    return norms, peak.peak


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("budget", [48 * KIB, 32 * KIB])
def test_temporaries_keep_to_the_budget(name: str, budget: int) -> None:
    form = FORMS[name]()
    free, before = norms_and_peak(form, None)
    bound, after = norms_and_peak(form, budget)
    torch.testing.assert_close(bound, free, rtol=2e-5, atol=0)
    exact = form.dense().double().flatten(1).square().sum(1)
    torch.testing.assert_close(bound.double(), exact, rtol=2e-5, atol=0)
    # The answer itself, a few numbers for each sample, comes on top.
    assert after <= budget + 2 * KIB
    assert before > budget


@pytest.mark.parametrize("name", ["gram", "direct", "direct, groups"])
def test_the_diagonal_keeps_to_the_budget_beside_itself(name: str) -> None:
    form = FORMS[name]()
    with Peak() as peak, memory_limit(64 * KIB):
        found = form.sum_of_squares()
    torch.testing.assert_close(found, form.dense().square().sum(0), rtol=2e-5, atol=1e-6)
    assert peak.peak <= 64 * KIB + 3 * found.nbytes
    with Peak() as peak, memory_limit(64 * KIB), torch.no_grad():
        both = form.squares_and_norms()
    if both is not None:
        torch.testing.assert_close(both[0], found, rtol=2e-5, atol=1e-6)
    assert peak.peak <= 64 * KIB + 3 * found.nbytes


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ["gram", "direct", "rows"])
def test_sums_over_channels_keep_to_the_budget(name: str, axis: int) -> None:
    form = FORMS[name]()
    with Peak() as peak, memory_limit(96 * KIB):
        found = form.channel_squares(ChannelSums(axis))
    expected = form.dense().double().square().sum(0).sum(1 - axis)
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=1e-6)
    # What is summed for one parameter at a time is at most as large as that parameter.
    assert peak.peak <= 96 * KIB + 3 * form.shape[0] * form.shape[1] * 4


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(40, 16), nn.Linear(16, 64), nn.Tanh(), nn.LayerNorm(64), nn.Linear(64, 5)
    ).double()


def test_a_report_and_a_monitor_give_the_same_numbers() -> None:
    model, x, y = network(), torch.randint(40, (6, 9)), torch.randint(5, (6,))
    reports = []
    for max_memory in (None, 5000):
        monitor = FisherMonitor(model, diagonal=True, max_memory=max_memory)
        with monitor:
            F.cross_entropy(model(x).mean(1), y).backward()
        reports.append((monitor.report(), monitor.diagonal))
    pd.testing.assert_frame_equal(*(report for report, _ in reports), rtol=1e-10)
    torch.testing.assert_close(*(diagonal for _, diagonal in reports))
    tables = [
        fisher_report(model, lambda out, y: F.cross_entropy(out.mean(1), y), (x, y), progress=False, max_memory=limit)
        for limit in (None, 5000)
    ]
    pd.testing.assert_frame_equal(*tables, rtol=1e-10)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "1 GB"])
def test_a_budget_is_a_number_of_bytes(wrong: Any) -> None:
    with pytest.raises(ArgumentError, match="max_memory must be a number of bytes"):
        FisherMonitor(network(), max_memory=wrong)
    with pytest.raises(ArgumentError, match="max_memory must be a number of bytes"):
        fisher_report(network(), F.cross_entropy, [], max_memory=wrong)
