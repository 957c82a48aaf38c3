"""Standard errors, norms of whole gradients, diagonals, single samples and activations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from monitor.classifier import (
    REDUCTIONS,
    backward,
    batch,
    classifier,
    cross_entropy,
    norms,
)
from oracles import (
    activation_squared_norms,
    assert_equal,
    per_sample_gradients,
)
from torch_secorder import FisherMonitor, fisher_results
from torch_secorder.errors import CurvatureError

# Standard errors


def stderr(t: np.ndarray, reduction: str) -> float:
    n = len(t)
    return float(np.std(t, ddof=1) / math.sqrt(n) * (n if reduction == "sum" else 1))


GROUPINGS: dict[str, Any] = {
    "module": lambda name: name.rpartition(".")[0],
    "type": lambda name: "Linear",
    "callable": lambda name: "weights" if name.endswith("weight") else "biases",
    "total": lambda name: "everything",
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_standard_errors_of_parameters(reduction: str) -> None:
    model, batches = classifier(), [batch(5), batch(3), batch(4)]
    with FisherMonitor(model, reduction=reduction) as monitor:
        for x, y in batches:
            backward(model, x, y, reduction)
    report = monitor.report()
    for name, t in norms(model, *batches).items():
        expected = stderr(t.numpy(), reduction)
        assert report.loc[name, "fisher_trace_stderr"] == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_standard_errors_of_groups(grouping: str, reduction: str) -> None:
    model, batches = classifier(), [batch(5), batch(3), batch(4)]
    with FisherMonitor(model, reduction=reduction) as monitor:
        for x, y in batches:
            backward(model, x, y, reduction)
    group_of = GROUPINGS[grouping]
    report = monitor.report(by=grouping if grouping in ("module", "type") else group_of)
    sums: dict[str, np.ndarray] = {}
    for name, t in norms(model, *batches).items():
        sums[group_of(name)] = sums.get(group_of(name), 0) + t.numpy()
    assert list(report.index) == list(sums)
    for group, t in sums.items():
        assert report.loc[group, "fisher_trace_stderr"] == pytest.approx(stderr(t, reduction), rel=1e-8)


def test_one_sample_has_no_standard_error() -> None:
    model = classifier()
    with FisherMonitor(model) as monitor:
        backward(model, *batch(1))
    assert monitor.report()["fisher_trace_stderr"].isna().all()
    assert monitor.report(by="module")["fisher_trace_stderr"].isna().all()
    assert monitor.report()["fisher_trace"].notna().all()


def test_equal_samples_have_a_standard_error_of_zero() -> None:
    model, (x, y) = classifier(), batch(1)
    with FisherMonitor(model) as monitor:
        backward(model, x.repeat(6, 1), y.repeat(6))
    report = monitor.report()
    assert (report["fisher_trace_stderr"] >= 0).all()
    assert (report["fisher_trace_stderr"] <= 1e-7 * report["fisher_trace"]).all()


# grad_sq_norm


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_grad_sq_norm_is_the_mean_over_passes(reduction: str) -> None:
    model, batches = classifier(), [batch(5), batch(3)]
    expected: dict[str, list[float]] = {name: [] for name, _ in model.named_parameters()}
    for x, y in batches:
        model.zero_grad()
        backward(model, x, y, reduction)
        for name, p in model.named_parameters():
            expected[name].append(float(p.grad.square().sum()))
    model.zero_grad()
    with FisherMonitor(model, reduction=reduction) as monitor:
        for x, y in batches:  # accumulating: the norm is that of what each pass adds
            backward(model, x, y, reduction)
    for name, values in expected.items():
        assert monitor.report().loc[name, "grad_sq_norm"] == pytest.approx(np.mean(values), rel=1e-8)
    by_module = monitor.report(by="module")
    assert by_module.loc["0", "grad_sq_norm"] == pytest.approx(
        np.mean(expected["0.weight"]) + np.mean(expected["0.bias"])
    )


def test_grad_sq_norm_of_a_frozen_parameter_is_nan() -> None:
    model, data = classifier(), batch()
    model[0].requires_grad_(False)
    with FisherMonitor(model, parameters="all") as monitor:
        backward(model, *data)
    missing = monitor.report()["grad_sq_norm"].isna()
    assert dict(missing) == {"0.weight": True, "0.bias": True, "2.weight": False, "2.bias": False}
    assert monitor.report()["fisher_trace"].gt(0).all()


def test_a_parameter_that_no_backward_reached_is_unused() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model, data = Spare().double(), batch()
    with FisherMonitor(model) as monitor:
        backward(model, *data)
    report = monitor.report()
    assert list(report["rule"] == "unused") == [False, False, True, True]
    assert list(report.loc[["spare.weight", "spare.bias"], "fisher_trace"]) == [0, 0]
    assert list(report.loc[["spare.weight", "spare.bias"], "fisher_trace_share"]) == [0, 0]


# Diagonal, per sample, activations


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_diagonal_sums_to_the_trace(reduction: str) -> None:
    model, batches = classifier(), [batch(5), batch(3)]
    with FisherMonitor(model, reduction=reduction, diagonal=True) as monitor:
        for x, y in batches:
            backward(model, x, y, reduction)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    squares = {n: g.square() for n, g in per_sample_gradients(model, cross_entropy(), x, y).items()}
    for name, p in model.named_parameters():
        expected = squares[name].mean(0) if reduction == "mean" else squares[name].sum(0)
        assert monitor.diagonal[name].shape == p.shape
        assert_equal(monitor.diagonal[name], expected, monitor.trace)
        assert float(monitor.diagonal[name].sum()) == pytest.approx(
            monitor.report().loc[name, "fisher_trace"], rel=1e-8
        )


def test_per_sample_has_a_row_per_sample_in_backward_order() -> None:
    model, batches = classifier(), [batch(5), batch(3)]
    with FisherMonitor(model, reduction="sum", per_sample=True) as monitor:
        for x, y in batches:
            backward(model, x, y, "sum")
    table, squared = monitor.per_sample, norms(model, *batches)
    assert isinstance(table, pd.DataFrame)
    assert list(table.columns) == list(squared)
    assert len(table) == 8
    for name, t in squared.items():
        assert_equal(torch.tensor(table[name].to_numpy()), t, monitor.trace)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_activation_traces(reduction: str) -> None:
    model, (x, y) = classifier(), batch()
    with FisherMonitor(model, reduction=reduction, activations=True) as monitor:
        backward(model, x, y, reduction)
    table = monitor.activations
    assert list(table.columns[:2]) == ["module_type", "activation_trace"]
    for name in ("0", "2"):
        t = activation_squared_norms(model, name, cross_entropy(), x, y)
        expected = t.mean() if reduction == "mean" else t.sum()
        assert table.loc[name, "activation_trace"] == pytest.approx(float(expected), rel=1e-8)
        assert table.loc[name, "module_type"] == "Linear"


def test_activations_have_a_row_per_module_and_pooled_moments() -> None:
    model, batches = classifier(), [batch(5), batch(3)]
    with FisherMonitor(model, activations=True) as monitor:
        for x, y in batches:
            backward(model, x, y)
    table = monitor.activations
    assert set(table.index) == {"", "0", "1", "2"}
    assert table.index.name == "module"
    outputs = model[0](torch.cat([x for x, _ in batches])).detach()
    row = table.loc["0"]
    assert row["mean"] == pytest.approx(float(outputs.mean()), rel=1e-9)
    assert row["std"] == pytest.approx(float(outputs.std(correction=0)), rel=1e-9)
    assert (row["min"], row["max"]) == (float(outputs.min()), float(outputs.max()))
    squared = [len(x) * activation_squared_norms(model, "1", cross_entropy(), x, y).mean() for x, y in batches]
    assert table.loc["1", "activation_trace"] == pytest.approx(float(sum(squared)) / 8, rel=1e-9)


class Hiding(nn.Module):
    """A module whose output is that of a re-entrant checkpoint, which a Linear layer makes as a view of a 2-D product."""

    def __init__(self, hides: bool) -> None:
        super().__init__()
        self.body, self.hides = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)), hides

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=True) if self.hides else self.body(x)


def test_activation_traces_of_a_re_entrant_checkpoint() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Hiding(True), nn.Flatten(1), nn.Linear(12, 3)).double()
    x, y = torch.randn(5, 3, 4).double(), torch.randint(3, (5,))
    with FisherMonitor(model, activations=True) as monitor:
        backward(model, x, y)
    model[1].hides = False  # The loop differentiates for the outputs only, which such a checkpoint can't.
    for name in ("0", "1", "3"):
        expected = activation_squared_norms(model, name, cross_entropy(), x, y).mean()
        assert monitor.activations.loc[name, "activation_trace"] == pytest.approx(float(expected), rel=1e-8)


def test_activation_traces_of_modules_that_return_their_input_or_a_view_of_it() -> None:
    layers = (
        nn.Linear(3, 8),
        nn.Identity(),
        nn.Unflatten(1, (2, 4)),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Tanh(),
        nn.Identity(),
    )
    model = nn.Sequential(*layers, nn.Linear(8, 4)).double().eval()
    x, y = torch.randn(5, 3).double(), torch.randint(4, (5,))
    with FisherMonitor(model, activations=True) as monitor:
        backward(model, x, y)
    options: dict[str, Any] = {"activations": True, "progress": False}
    results = fisher_results(model, cross_entropy(), (x, y), **options)
    of_labels = fisher_results(model, None, (x, y), fisher="observed", **options)
    for table in (monitor.activations, results.activations, of_labels.activations):
        assert set(table.index) == {"", *map(str, range(8))}
        for name in map(str, range(8)):
            expected = activation_squared_norms(model, name, cross_entropy(), x, y).mean()
            assert table.loc[name, "activation_trace"] == pytest.approx(float(expected), rel=1e-8)


def test_activations_of_a_model_in_which_no_module_returns_a_tensor() -> None:
    model = nn.LSTM(3, 4, batch_first=True).double()
    with FisherMonitor(model, activations=True) as monitor:
        model(torch.randn(5, 2, 3).double())[0].square().mean().backward()
    assert monitor.activations.empty
    assert list(monitor.activations.columns) == [
        "module_type",
        "activation_trace",
        "numel",
        "mean",
        "std",
        "min",
        "max",
    ]
    assert monitor.activations.attrs["n_samples"] == 5


def test_activations_merge_and_reset() -> None:
    model, first, second = classifier(), batch(5), batch(3)
    monitors = []
    for batches in ([first], [second], [first, second]):
        with FisherMonitor(model, activations=True) as monitor:
            for x, y in batches:
                backward(model, x, y)
        monitors.append(monitor)
    pd.testing.assert_frame_equal(monitors[0].merge(monitors[1]).activations, monitors[2].activations, rtol=1e-12)
    other = FisherMonitor(model, activations=True)
    other.load_state_dict(monitors[2].state_dict())
    pd.testing.assert_frame_equal(other.activations, monitors[2].activations)
    monitors[2].reset()
    with pytest.raises(CurvatureError, match=r"(?i)no sample"):
        _ = monitors[2].activations
