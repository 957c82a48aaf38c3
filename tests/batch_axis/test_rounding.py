"""Devices that add in another order each time: what comes back differs in its digits, and samples are found all the same."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from torch_secorder import FisherMonitor
from torch_secorder.autograd.graph_pass import GraphPass
from torch_secorder.autograd.opaque import Gradients
from torch_secorder.batch_axis.derivation import Derivation
from torch_secorder.batch_axis.search_pass import SearchPasses
from torch_secorder.batch_axis.silence import loud_samples

WIDTH, DEPTH = 16, 24
# How much of a number is lost where it is rounded another way: one digit, and in single precision as many as in a deeper model.
LOST = {torch.bfloat16: 2.0**-7, torch.float32: 2.0**-17}


class Residual(nn.Module):
    """Positions of which each adds what a layer makes of it; the first ones add what all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(6, WIDTH))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each look whether it is one by silence."""
    found: list[bool] = []
    look = SearchPasses._looked_at

    def noted(self: SearchPasses, wanted: Any, *, by_silence: bool, in_brief: bool) -> Any:
        found.append(by_silence)
        return look(self, wanted, by_silence=by_silence, in_brief=in_brief)

    monkeypatch.setattr(SearchPasses, "_looked_at", noted)
    monkeypatch.setattr(Derivation, "findings", lambda self, wanted: None)  # as in a graph whose nodes tell nothing
    return found


@pytest.fixture
def unordered(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a look, every product of matrices is rounded another way in some places, others in each pass."""
    called, generator = GraphPass._called, torch.Generator().manual_seed(0)

    def rounded(x: Tensor) -> Tensor:
        coin = torch.rand(x.shape, generator=generator)
        return torch.where(coin < 0.5, x, x * (1 + LOST[x.dtype]))

    def inexact(self: GraphPass, node: Node, grads: Gradients) -> list[Tensor | None]:
        results = called(self, node, grads)
        if node.name() not in ("MmBackward0", "AddmmBackward0"):
            return results
        return [None if x is None else rounded(x) for x in results]

    monkeypatch.setattr(GraphPass, "_called", inexact)


def analyzed(n: int, dtype: torch.dtype) -> FisherMonitor:
    torch.manual_seed(0)
    model, x = Residual().to(dtype), torch.randn(n, 6, WIDTH).to(dtype)
    with FisherMonitor(model, per_sample=True) as monitor:
        model(x).float().square().flatten(1).sum(1).mean().backward()
    return monitor


@pytest.mark.parametrize("dtype", list(LOST), ids=str)
@pytest.mark.parametrize(("n", "expected"), [(2, [True]), (5, [False, True])])
def test_rounding_is_not_taken_for_what_samples_share(
    n: int, expected: list[bool], dtype: torch.dtype, looks: list[bool], request: pytest.FixtureRequest
) -> None:
    """With five samples marks leave it open, and a second look shows it; two are looked at by silence at once."""
    exact = analyzed(n, dtype)
    assert looks == expected[:1]
    looks.clear()
    request.getfixturevalue("unordered")
    found = analyzed(n, dtype)
    assert looks == expected
    assert found.report()["rule"].to_dict() == exact.report()["rule"].to_dict()
    assert found.per_sample.equals(exact.per_sample)


@pytest.mark.parametrize("n", [*range(1, 40), 64, 1000])
def test_of_any_two_samples_each_is_loud_while_the_other_is_silent(n: int) -> None:
    loud = torch.stack(loud_samples(n)).bool()
    assert bool(loud.any(0).all())
    for a, b in itertools.permutations(range(min(n, 40)), 2):
        assert bool((loud[:, a] & ~loud[:, b]).any())


def test_as_few_passes_as_tell_samples_apart() -> None:
    assert [len(loud_samples(n)) for n in (1, 2, 3, 6, 10, 20, 70, 252)] == [1, 2, 3, 4, 5, 6, 8, 10]
