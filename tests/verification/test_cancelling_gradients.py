"""Gradients that cancel in each sample: nothing of the analyzed parameters says how large the terms were."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracles import assert_equal
from torch_secorder import FisherMonitor
from torch_secorder.errors import CoverageError

N, PLACES, WIDTH = 4, 5, 6


class Scores(nn.Module):
    """One number for each place, and a softmax over the places behind it: its bias moves all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x).tanh()).squeeze(-1)


class Attention(nn.Module):
    """The bias of the keys adds the same to all scores of a query."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.last, self.values = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores = (self.queries(x) @ self.last(x).mT).softmax(-1)
        return (scores @ self.values(x)).square().sum(-1)


class Normalized(nn.Module):
    """What normalizes the channels over their places takes their mean away."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.norm = nn.Conv1d(WIDTH, 3, 1), nn.InstanceNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.last(x.mT)).tanh().sum(1)


MODELS: list[Callable[[], nn.Module]] = [Scores, Attention, Normalized]


def problem(model: Callable[[], nn.Module], dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    return model().to(dtype), torch.randn(N, PLACES, WIDTH, dtype=dtype), torch.randint(PLACES, (N,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("of", MODELS)
def test_a_bias_alone_whose_gradient_cancels(of: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    """Its trace is zero but for rounding, as by plain autograd."""
    model, x, y = problem(of, dtype)
    (right,) = torch.autograd.grad(F.cross_entropy(model(x[:1]), y[:1]), [model.last.bias])
    rounding = (100 * torch.finfo(dtype).eps) ** 2  # Terms of some tens cancel in the attention.
    assert float(right.square().sum()) < rounding
    with FisherMonitor(model, parameters=["last.bias"]) as monitor:
        F.cross_entropy(model(x), y).backward()
    assert float(monitor.trace) < rounding


def test_a_batch_of_padding() -> None:
    """All places are alike, so that the weight's gradients cancel with the bias'."""
    model, x, y = problem(Scores, torch.float64)
    with FisherMonitor(model) as monitor:
        F.cross_entropy(model(x * 0), y).backward()
    assert float(monitor.trace) < 1e-28


@pytest.mark.parametrize(("dtype", "weight"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("of", MODELS)
def test_a_penalty_beside_it_is_found(of: Callable[[], nn.Module], dtype: torch.dtype, weight: float) -> None:
    model, x, y = problem(of, dtype)
    refused = pytest.raises(CoverageError, match="is not the sum of what the model's samples contribute")
    with refused, FisherMonitor(model, parameters=["last.bias"]):
        (F.cross_entropy(model(x), y) + weight * model.last.bias[0]).backward()


def test_other_parameters_keep_their_traces() -> None:
    model, x, y = problem(Scores, torch.float64)
    names, parameters = zip(*model.named_parameters(), strict=True)
    rows = [torch.autograd.grad(F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]), parameters) for n in range(N)]
    expected = [torch.stack(own).square().sum() / N for own in zip(*rows, strict=True)]
    with FisherMonitor(model) as monitor:
        F.cross_entropy(model(x), y).backward()
    for name, value in zip(names, expected, strict=True):
        assert_equal(torch.tensor(monitor.report().loc[name, "fisher_trace"]), value, sum(expected), torch.float64)
