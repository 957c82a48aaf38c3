"""Calls that leave open what a sample is, and gradients that are not finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model_state import assert_same_gradients, gradients, hooks
from monitor.classifier import (
    REDUCTIONS,
    assert_report,
    assert_same_report,
    backward,
    batch,
    classifier,
    cross_entropy,
    norms,
)
from oracles import (
    assert_equal,
    per_sample_squared_norms,
)
from torch_secorder import FisherMonitor
from torch_secorder.errors import CurvatureError

# Calls that leave open what a sample is


def test_two_backwards_through_one_forward_raise() -> None:
    model, (x, y), other = classifier(), batch(), batch(3)
    with FisherMonitor(model) as monitor:
        backward(model, *other)
        loss = cross_entropy()(model(x), y)
        loss.backward(retain_graph=True)
        model.zero_grad()
        with pytest.raises(CurvatureError, match=r"(?i)repeated_calls|twice|two backward|second backward|again"):
            loss.backward()
        mine = gradients(model)
        model.zero_grad()
    backward(model, x, y)
    assert_same_gradients(mine, gradients(model))
    assert monitor.n_samples in (3, 8)
    assert not any(hooks(model).values())


def siamese(model: nn.Module, pair: Tensor) -> Tensor:
    return model(pair[:, 0]) - model(pair[:, 1])


class Siamese(nn.Module):
    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, pair: Tensor) -> Tensor:
        return siamese(self.body, pair)


def test_two_calls_of_the_model_reached_by_one_backward_raise() -> None:
    model, (x, y), other = classifier(), batch(), batch(3)
    pair = torch.stack([x, x.flip(0)], 1)
    with FisherMonitor(model) as monitor:
        backward(model, *other)
        model.zero_grad()
        loss = cross_entropy()(siamese(model, pair), y)
        with pytest.raises(CurvatureError, match=r"repeated_calls"):
            loss.backward()
        mine = gradients(model)
    model.zero_grad()
    cross_entropy()(siamese(model, pair), y).backward()
    assert_same_gradients(mine, gradients(model))
    assert_report(monitor, norms(model, other))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_repeated_calls_of_the_same_samples(reduction: str) -> None:
    model, (x, y) = classifier(), batch()
    pair = torch.stack([x, torch.randn_like(x)], 1)
    loss_fn = cross_entropy(reduction)
    with FisherMonitor(model, reduction=reduction, repeated_calls="same") as monitor:
        loss_fn(siamese(model, pair), y).backward()
    squared = per_sample_squared_norms(Siamese(model), loss_fn, pair, y)
    assert_report(monitor, {name.removeprefix("body."): t for name, t in squared.items()}, reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_repeated_calls_of_new_samples(reduction: str) -> None:
    """The loss is the mean, or the sum, over the samples of all the calls that the backward pass reaches."""
    model, first, second = classifier(), batch(5), batch(3)
    with FisherMonitor(model, reduction=reduction, repeated_calls="new") as monitor:
        loss = sum(cross_entropy("sum")(model(x), y) for x, y in (first, second))
        (loss / 8 if reduction == "mean" else loss).backward()
    assert_report(monitor, norms(model, first, second), reduction)


def test_repeated_calls_of_the_same_samples_must_be_as_many() -> None:
    model, first, second = classifier(), batch(5), batch(3)
    with FisherMonitor(model, repeated_calls="same"), pytest.raises(CurvatureError, match=r"(?s)5.*3|3.*5"):
        sum(cross_entropy()(model(x), y) for x, y in (first, second)).backward()


# Gradients that are not finite


everything = pytest.mark.parametrize(
    "options", [{}, {"diagonal": True, "per_sample": True}], ids=["plain", "everything"]
)


@everything
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_parameters_and_loses_nothing(
    value: float, options: dict[str, Any]
) -> None:
    model, first, second = classifier(), batch(5), batch(3)
    with FisherMonitor(model, **options) as monitor:
        backward(model, *first)
        before = monitor.report()
        model.zero_grad()
        with pytest.raises(CurvatureError, match=r"(?s)0\.weight.*nonfinite|nonfinite.*0\.weight"):
            (cross_entropy()(model(second[0]), second[1]) * value).backward()
        assert all(p.grad is not None for p in model.parameters())
        assert_same_report(monitor.report(), before)
        backward(model, *second)
    assert_report(monitor, norms(model, first, second))
    if options:
        assert len(monitor.per_sample) == 8
        assert all(torch.isfinite(d).all() for d in monitor.diagonal.values())


def test_only_the_parameters_that_are_not_finite_are_named() -> None:
    """An infinite input saturates tanh: the first weight's gradient is 0 * inf, all others are finite."""
    model, (x, y) = classifier(), batch()
    x[0, 0] = math.inf
    with FisherMonitor(model), pytest.raises(CurvatureError, match=r"0\.weight") as raised:
        backward(model, x, y)
    assert not any(name in str(raised.value) for name in ("0.bias", "2.weight", "2.bias"))


@everything
def test_batches_that_are_not_finite_may_be_skipped(options: dict[str, Any]) -> None:
    model, first, second = classifier(), batch(5), batch(3)
    with FisherMonitor(model, nonfinite="skip", **options) as monitor:
        backward(model, *first)
        (cross_entropy()(model(second[0]), second[1]) * math.nan).backward()
        backward(model, *second)
    assert_report(monitor, norms(model, first, second))
    if options:
        assert len(monitor.per_sample) == 8
        diagonals = torch.stack([d.sum() for d in monitor.diagonal.values()])
        assert_equal(diagonals.sum(), monitor.trace, monitor.trace, torch.float64)
    assert monitor.report()["grad_sq_norm"].notna().all()


@everything
def test_only_the_samples_that_are_not_finite_are_skipped(options: dict[str, Any]) -> None:
    model, (x, y) = classifier(), batch(5)
    kept = torch.tensor([0, 1, 3, 4])
    expected = norms(model, (x[kept], y[kept]))
    x[2, 0] = math.nan
    with FisherMonitor(model, nonfinite="skip", **options) as monitor:
        backward(model, x, y)
    assert_report(monitor, expected)
    if options:
        for name, t in expected.items():
            assert_equal(torch.tensor(monitor.per_sample[name].to_numpy()), t, monitor.trace)
            assert_equal(monitor.diagonal[name].sum(), t.mean(), monitor.trace)
