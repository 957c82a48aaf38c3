"""The gradient noise scale against pairs of samples, variances, and every batch that a small population can give."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from oracles import assert_equal, per_sample_gradients
from torch_secorder import FisherMonitor, fisher_report
from torch_secorder.errors import ArgumentError
from torch_secorder.noise_scale import gradient_noise_scale
from torch_secorder.tables import read_report

MODULES = {"0": ["0.weight", "0.bias"], "2": ["2.weight", "2.bias"]}
MODULES["model"] = [*MODULES["0"], *MODULES["2"]]


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def data(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))


def report_of(model: nn.Module, *batches: tuple[Tensor, Tensor], reduction: str = "mean") -> pd.DataFrame:
    with FisherMonitor(model, reduction=reduction) as monitor:
        for x, y in batches:
            nn.functional.cross_entropy(model(x), y, reduction=reduction).backward()
    return monitor.report()


def gradients(model: nn.Module, x: Tensor, y: Tensor, names: list[str]) -> Tensor:
    """g_n, [n, numel], from a loop over single samples."""
    found = per_sample_gradients(model, nn.CrossEntropyLoss(), x, y)
    return torch.cat([found[name].flatten(1) for name in names], 1)


def pairs(g: Tensor) -> Tensor:
    """The mean of g_n . g_m over the pairs of different samples."""
    return torch.stack([g[n] @ g[m] for n, m in itertools.permutations(range(len(g)), 2)]).mean()


def variance(g: Tensor) -> Tensor:
    return g.var(0, correction=1).sum()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_batch_is_the_mean_over_pairs_and_the_variance(reduction: str) -> None:
    model, (x, y) = classifier(), data(6)
    report = report_of(model, (x, y), reduction=reduction)
    found = pd.concat([gradient_noise_scale(report), gradient_noise_scale(report, by="model")])
    assert list(found.index) == list(MODULES)
    for name, members in MODULES.items():
        g = gradients(model, x, y, members)
        signal, noise = pairs(g), variance(g)
        assert found.loc[name, "numel"] == g.shape[1]
        for column, expected in {"true_grad_sq_norm": signal, "noise_trace": noise}.items():
            assert_equal(torch.tensor(found.loc[name, column]), expected, expected.abs(), torch.float64)
        scale = float(noise / signal) if signal > 0 else math.nan
        assert found.loc[name, "noise_scale"] == pytest.approx(scale, rel=1e-8, nan_ok=True)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_several_batches_are_averaged(reduction: str) -> None:
    model, batches = classifier(), [data(4) for _ in range(3)]
    found = gradient_noise_scale(report_of(model, *batches, reduction=reduction), by="model").loc["model"]
    every = [gradients(model, x, y, MODULES["model"]) for x, y in batches]
    signal, noise = (torch.stack([part(g) for g in every]).mean() for part in (pairs, variance))
    assert_equal(torch.tensor(found["true_grad_sq_norm"]), signal, signal.abs(), torch.float64)
    assert_equal(torch.tensor(found["noise_trace"]), noise, noise, torch.float64)


@pytest.mark.slow
def test_no_bias_with_batches_of_unequal_size() -> None:
    """Over all 64 ways to draw a batch of one and one of two from four samples, the means are the population's own."""
    model, (x, y) = classifier(), data(4)
    signals, noises = [], []
    for a, b, c in itertools.product(range(4), repeat=3):
        found = gradient_noise_scale(report_of(model, (x[[a]], y[[a]]), (x[[b, c]], y[[b, c]])), by="model").loc[
            "model"
        ]
        signals.append(found["true_grad_sq_norm"])
        noises.append(found["noise_trace"])
    g = gradients(model, x, y, MODULES["model"])
    signal, noise = g.mean(0).square().sum(), g.var(0, correction=0).sum()
    assert_equal(torch.tensor(signals).double().mean(), signal, signal, torch.float64)
    assert_equal(torch.tensor(noises).double().mean(), noise, noise, torch.float64)


def test_parts_add_up_over_every_grouping() -> None:
    report = report_of(classifier(), data(6), data(5))
    for by in (None, "module", "type", lambda name: name[-1]):
        found, total = gradient_noise_scale(report, by=by), gradient_noise_scale(report, by="model").loc["model"]
        for column in ("numel", "true_grad_sq_norm", "noise_trace"):
            assert found[column].sum() == pytest.approx(total[column], rel=1e-12)
    assert gradient_noise_scale(report, by=None).index.equals(report.index)


def test_a_report_that_was_written_and_read(tmp_path: Path) -> None:
    report = report_of(classifier(), data(6), data(5))
    report.assign(**report.attrs).to_csv(tmp_path / "report.csv")
    again = gradient_noise_scale(read_report(tmp_path / "report.csv").astype({"module": str}))
    pd.testing.assert_frame_equal(again, gradient_noise_scale(report), rtol=1e-12, check_index_type=False)


def test_same_samples_have_no_noise() -> None:
    x, y = data(1)
    found = gradient_noise_scale(report_of(classifier(), (x.expand(5, 4), y.expand(5))), by="model").loc["model"]
    assert found["noise_scale"] == pytest.approx(0, abs=1e-12)


def test_parameters_without_a_gradient_are_left_out() -> None:
    model, (x, y) = classifier(), data(6)
    model[0].requires_grad_(False)
    with FisherMonitor(model, parameters="all") as monitor:
        nn.functional.cross_entropy(model(x), y).backward()
    found = gradient_noise_scale(monitor.report())
    assert found.loc["0"].isna().sum() == 3
    assert found.loc["0", "numel"] == 0
    total = gradient_noise_scale(monitor.report(), by="model").loc["model"]
    assert total["noise_trace"] == found.loc["2", "noise_trace"]
    assert float(variance(gradients(model, x, y, MODULES["2"]))) == pytest.approx(total["noise_trace"], rel=1e-8)


def test_too_few_samples_to_tell() -> None:
    """Two opposite gradients: the estimate of the squared gradient is negative, and no scale is made of it."""
    model = nn.Linear(1, 1, bias=False).double()
    with FisherMonitor(model) as monitor:
        (model(torch.tensor([[1.0], [-1.0]], dtype=torch.float64)).sum() / 2).backward()
    found = gradient_noise_scale(monitor.report(), by="model").loc["model"]
    assert found["true_grad_sq_norm"] == pytest.approx(-1)
    assert found["noise_trace"] == pytest.approx(2)
    assert math.isnan(found["noise_scale"])


def test_what_cannot_be_told_is_refused_in_words() -> None:
    model = classifier()
    good = report_of(model, data(4))
    plain = good.copy()
    plain.attrs.clear()
    for report, by, words in (
        (
            fisher_report(model, nn.CrossEntropyLoss(), data(4), progress=False),
            "module",
            "take a FisherMonitor's report",
        ),
        (report_of(model, data(1), data(1)), "module", "batches of two or more"),
        (report_of(model, data(3), data(4), reduction="sum"), "module", "batches of one size"),
        (good.drop(columns="grad_sq_norm"), "module", "no column grad_sq_norm"),
        (plain, "module", "report.attrs has no reduction"),
        (good, "layer", "by must be None"),
    ):
        with pytest.raises(ArgumentError, match=words):
            gradient_noise_scale(report, by=by)
    with FisherMonitor(model) as monitor:
        nn.functional.cross_entropy(model(data(4)[0]), data(4)[1]).backward()
    with pytest.raises(ArgumentError, match="by parameter"):
        gradient_noise_scale(monitor.report(by="type"))


def test_a_monitor_in_the_reports_place_is_refused() -> None:
    with pytest.raises(
        ArgumentError, match=r"as monitor\.report\(\) returns it, not an object of the type FisherMonitor"
    ):
        gradient_noise_scale(FisherMonitor(classifier()))  # type: ignore[arg-type]
