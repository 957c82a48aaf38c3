"""Hutchinson's estimate against the Hessian itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_state import assert_unchanged, state
from torch_secorder import hessian_trace
from torch_secorder.errors import CurvatureError


class Attention(nn.Module):
    """Self-attention over a sequence, and a tied output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.norm = (
            nn.Embedding(6, 4),
            nn.MultiheadAttention(4, 2, batch_first=True),
            nn.LayerNorm(4),
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        return F.linear(self.norm(x + self.mix(x, x, x, need_weights=False)[0]), self.words.weight).mean(1)


MODELS: dict[str, tuple[Any, Any]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)), lambda: torch.randn(6, 3).double()),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.GELU(), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)),
        lambda: torch.randn(6, 1, 4, 4).double(),
    ),
    "attention": (Attention, lambda: torch.randint(6, (5, 3))),
}


def exact(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """The traces of the Hessian's blocks, from the whole Hessian of each."""
    traces = {}
    for name, p in model.named_parameters():

        def loss(value: Tensor, name: str = name) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(model, {name: value}, (x,)), y)

        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            full = torch.autograd.functional.hessian(loss, p.detach().clone())
        traces[name] = float(full.reshape(p.numel(), p.numel()).trace())
    return traces


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_estimate_is_unbiased_and_its_error_is_told(name: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name][0]().double(), MODELS[name][1]()
    y = torch.randint(3, (len(x),))
    before = state(model)
    table = hessian_trace(model, F.cross_entropy, x, y, 400, generator=torch.Generator().manual_seed(1))
    assert_unchanged(before, model)
    expected = exact(model, x, y)
    assert list(table.index) == list(expected)
    for parameter, row in table.iterrows():
        assert abs(row.hessian_trace - expected[parameter]) <= 4.5 * row.hessian_trace_stderr + 1e-9, parameter
    assert abs(table.attrs["trace"] - sum(expected.values())) <= 4.5 * table.attrs["trace_stderr"]
    assert 0 < table.attrs["trace_stderr"] < 0.2 * abs(sum(expected.values()))
    assert list(table.columns[-3:]) == ["hessian_trace_stderr", "hessian_trace_share", "hessian_mean"]


def test_a_quadratic_needs_one_probe_only() -> None:
    """The Hessian in a diagonal quadratic is diagonal, where random signs make no error at all."""
    model = nn.Linear(1, 3, bias=False).double()
    x, y = torch.randn(7, 1).double(), torch.zeros(7, 3).double()
    table = hessian_trace(model, nn.MSELoss(reduction="sum"), x, y, 1)
    torch.testing.assert_close(table.hessian_trace["weight"], 6 * float(x.square().sum()))


def test_it_stops_at_its_tolerance() -> None:
    model, x = MODELS["mlp"][0]().double(), MODELS["mlp"][1]()
    y = torch.randint(3, (6,))
    loose, tight = (hessian_trace(model, F.cross_entropy, x, y, 500, tolerance=t) for t in (0.5, 0.02))
    assert 8 <= loose.attrs["num_samples"] < tight.attrs["num_samples"] <= 500
    assert tight.attrs["num_samples"] == 500 or tight.attrs["trace_stderr"] <= 0.02 * abs(tight.attrs["trace"])


def test_groups_and_a_linear_loss() -> None:
    model, x = MODELS["mlp"][0]().double(), MODELS["mlp"][1]()
    assert list(hessian_trace(model, lambda out, _: out.square().sum(), x, None, 3, by="module").index) == ["0", "2"]
    linear = nn.Linear(3, 2).double()
    assert (hessian_trace(linear, lambda out, _: out.sum(), x, None, 3).hessian_trace == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": True}, "num_samples"),
        ({"tolerance": 0}, "tolerance"),
        ({"tolerance": "small"}, "tolerance"),
        ({"loss_fn": lambda out, _: out}, "scalar"),
        ({"loss_fn": lambda out, _: out.detach().sum()}, "does not depend"),
        ({"loss_fn": lambda out, _: out.sum() * float("inf")}, "not finite"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    model, x = MODELS["mlp"][0]().double(), MODELS["mlp"][1]()
    options = {"loss_fn": lambda out, _: out.square().sum(), "num_samples": 2} | arguments
    with pytest.raises(CurvatureError, match=message):
        hessian_trace(model, options.pop("loss_fn"), x, None, options.pop("num_samples"), **options)
