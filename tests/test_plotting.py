"""Every picture is drawn into the Axes that it is given, and shows the numbers that it is given."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from typing import Any

import matplotlib
import pandas as pd
import pytest
import torch
from torch import nn

from torch_secorder import fisher_report
from torch_secorder.errors import ArgumentError
from torch_secorder.plotting import (
    bars,
    heat_strip,
    predicted_against_measured,
    sensitivity_by_bits,
    styled,
    time_series,
)
from torch_secorder.pruning import pruning_sensitivity
from torch_secorder.quantization import allocate_bits, quantization_sensitivity

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.fixture
def report(model: nn.Module) -> pd.DataFrame:
    return fisher_report(model, None, (torch.randn(32, 4), None), fisher="exact", progress=False)


def drawings(model: nn.Module, report: pd.DataFrame) -> dict[str, Any]:
    sensitivity = quantization_sensitivity(model, report)
    return {
        "bars": lambda ax: bars(report, ax=ax),
        "heat_strip": lambda ax: heat_strip(report, ax=ax),
        "sensitivity_by_bits": lambda ax: sensitivity_by_bits(
            sensitivity, allocation=allocate_bits(sensitivity, 4), ax=ax
        ),
        "predicted_against_measured": lambda ax: predicted_against_measured({"a": ([1, 2], [1, 3])}, ax=ax),
        "time_series": lambda ax: time_series({0: report, 10: report}, ax=ax),
    }


@pytest.mark.parametrize(
    "name", ["bars", "heat_strip", "sensitivity_by_bits", "predicted_against_measured", "time_series"]
)
def test_it_takes_axes_and_returns_them(name: str, model: nn.Module, report: pd.DataFrame) -> None:
    draw = drawings(model, report)[name]
    figure, ax = plt.subplots()
    assert draw(ax) is ax
    figure.canvas.draw()
    assert ax.get_xlabel() or name == "heat_strip"
    own = draw(None)
    assert own is not ax
    own.figure.canvas.draw()


def test_bars_are_as_long_as_the_numbers(report: pd.DataFrame) -> None:
    ax = bars(report)
    assert [patch.get_width() for patch in ax.patches] == pytest.approx(list(report["fisher_trace"]))
    assert [label.get_text() for label in ax.get_yticklabels()] == list(report.index)
    ends = [segment[:, 0] for segment in ax.containers[0].lines[2][0].get_segments()]
    for (low, high), (_, row) in zip(ends, report.iterrows(), strict=True):
        assert (high - low) / 2 == pytest.approx(row["fisher_trace_stderr"])
    assert ax.get_xlabel() == "Fisher trace (mean over 32 samples, ± standard error)"
    top = bars(report, top=2)
    largest = set(report["fisher_trace"].nlargest(2).index)
    assert [label.get_text() for label in top.get_yticklabels()] == [name for name in report.index if name in largest]
    assert len(bars(report, "numel").patches) == 4


def test_a_strip_leaves_zeros_gray(report: pd.DataFrame) -> None:
    report.loc["2.bias", "fisher_mean"] = 0.0
    image = heat_strip(report).images[0].get_array()
    assert image is not None
    assert image.mask.tolist() == [[False, False, False, True]]
    assert image[0, 0] == report.loc["0.weight", "fisher_mean"]
    assert not heat_strip(report, log=False).images[0].get_array().mask.any()
    with pytest.raises(ArgumentError, match="no positive number"):
        heat_strip(report.assign(fisher_mean=0.0))


def test_sensitivities_of_bits_and_of_sparsities(model: nn.Module, report: pd.DataFrame) -> None:
    sensitivity = quantization_sensitivity(model, report, bits=(2, 4))
    best = allocate_bits(sensitivity, 3.5)
    ax = sensitivity_by_bits(sensitivity, allocation=best)
    assert ax.images[0].get_array().tolist() == pytest.approx(sensitivity[[2, 4]].to_numpy())
    assert [[2, 4][int(x)] for x in ax.lines[0].get_xdata()] == list(best["bits"])
    pruned = pruning_sensitivity({"a": torch.rand(4)}, (0.25, 0.5))
    assert [label.get_text() for label in sensitivity_by_bits(pruned).get_xticklabels()] == ["25%", "50%"]
    with pytest.raises(ArgumentError, match="other rows"):
        sensitivity_by_bits(sensitivity, allocation=best.iloc[:1])
    with pytest.raises(ArgumentError, match="not a sensitivity"):
        sensitivity_by_bits(report)


def test_points_that_cannot_be_drawn_are_counted() -> None:
    ax = predicted_against_measured({"a": ([1, 2, 0], [1, 3, 1]), "b": ([1], [-1])})
    assert ax.collections[0].get_offsets().tolist() == [[1, 1], [3, 2]]
    assert ax.get_legend().get_title().get_text() == "2 points not positive"
    with pytest.raises(ArgumentError, match="2 predictions for 1 measurements"):
        predicted_against_measured({"a": ([1, 2], [1])})
    with pytest.raises(ArgumentError, match="no point"):
        predicted_against_measured({"a": ([0], [1])})


def test_a_series_follows_its_rows(report: pd.DataFrame) -> None:
    reports = {10: report, 0: report.assign(fisher_trace=report["fisher_trace"] * 2)}
    ax = time_series(reports, rows=2)
    largest = report["fisher_trace"].nlargest(2)
    assert [line.get_label() for line in ax.lines] == list(largest.index)
    assert list(ax.lines[0].get_xdata()) == [0, 10]
    assert list(ax.lines[0].get_ydata()) == pytest.approx([2 * largest.iloc[0], largest.iloc[0]])
    assert [line.get_label() for line in time_series(reports, rows=["2.bias"]).lines] == ["2.bias"]
    hidden = time_series({step: r.rename(index={"2.bias": "_bias"}) for step, r in reports.items()}, rows=["_bias"])
    assert [text.get_text() for text in hidden.get_legend().get_texts()] == ["_bias"]
    with pytest.raises(ArgumentError, match="row 'other'"):
        time_series(reports, rows=["other"])
    with pytest.raises(ArgumentError, match="no report"):
        time_series({})


@pytest.mark.parametrize("draw", [bars, heat_strip])
def test_what_is_no_report(draw: Any, report: pd.DataFrame) -> None:
    for bad in (report.drop(columns=["fisher_trace", "fisher_mean"]), report.iloc[:0], [1]):
        with pytest.raises(ArgumentError, match="expected a report with the column"):
            draw(bad)
    with pytest.raises(ArgumentError, match="has no numbers"):
        draw(report, "rule")
    for series in ({}, [report]):
        with pytest.raises(ArgumentError, match="from steps to reports"):
            time_series(series)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="from labels to pairs"):
        predicted_against_measured([([1], [1])])  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="expected a report"):
        styled([1])  # type: ignore[arg-type]


def test_styled_reports(model: nn.Module, report: pd.DataFrame) -> None:
    pytest.importorskip("jinja2")
    report.loc["2.bias", "fisher_trace_stderr"] = math.nan
    page = styled(report).to_html()
    assert "8 × 4" in page
    assert f"{report.loc['0.weight', 'fisher_trace']:.4g}" in page
    assert f"{report.loc['0.weight', 'fisher_trace_share']:.1%}" in page
    assert "–" in page
    assert "nan" not in page.lower()
    assert "grad_sq_norm" not in page, "nothing is known of it"
    assert "<table" in styled(quantization_sensitivity(model, report)).to_html()


def test_a_styled_page_says_what_the_names_say(model: nn.Module) -> None:
    pytest.importorskip("jinja2")
    report = fisher_report(model, None, (torch.randn(8, 4), None), fisher="exact", by="module", progress=False)
    page = styled(report.rename(index={"0": "", "2": "<lambda>"})).to_html()
    assert ">(model)<" in page
    assert "&lt;lambda&gt;" in page
    assert "<lambda>" not in page
    shares = styled(pruning_sensitivity({"a": torch.rand(4)}, (0.25, 0.5))).to_html()
    assert ">25%<" in shares
    assert "background-color" in shares


@pytest.mark.slow
def test_many_long_names_keep_what_tells_them_apart(report: pd.DataFrame) -> None:
    prefix = "model.decoder.layers.with.a.long.way.to.it"
    many = pd.concat([report.rename(index=lambda name, k=k: f"{prefix}.{k}.{name}") for k in range(40)])
    many.attrs.update(report.attrs)
    names = [label.get_text() for label in bars(many).get_yticklabels()]
    assert names == [f"….{k}.{name}" for k in range(40) for name in report.index]
    ax = heat_strip(many)
    ax.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert all(a.x1 <= b.x0 for a, b in itertools.pairwise(boxes)), "labels overlap"
    assert ax.get_window_extent().height > 100, "the strip is there"
    assert len({label.get_text() for label in ax.get_xticklabels()}) == len(boxes) <= 60


@pytest.mark.parametrize(
    "draw", ["bars", "heat_strip", "sensitivity_by_bits", "predicted_against_measured", "time_series"]
)
def test_no_text_is_cut_off(draw: str, model: nn.Module, report: pd.DataFrame) -> None:
    figure = drawings(model, report)[draw](None).figure
    figure.canvas.draw()
    width, height = figure.bbox.max
    for axes in figure.axes:
        for text in (axes.xaxis.label, axes.yaxis.label, axes.title, *axes.texts):
            box = text.get_window_extent()
            if not text.get_text():
                continue
            assert min(box.x0, box.y0) >= -1, text.get_text()
            assert box.x1 <= width + 1, text.get_text()
            assert box.y1 <= height + 1, text.get_text()


def test_shares_are_percent(report: pd.DataFrame) -> None:
    report.loc["2.bias", "fisher_trace_share"] = 1e-5
    assert [text.get_text() for text in bars(report).texts][-1] == "< 0.1%"
    ax = bars(report, "fisher_trace_share")
    ax.figure.canvas.draw()
    assert all(label.get_text().endswith("%") for label in ax.get_xticklabels())


@pytest.mark.parametrize("picture", [bars, heat_strip], ids=["bars", "heat strip"])
def test_without_matplotlib_the_extra_is_named(picture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pyplot", "ticker", "colors", "cm"):
        monkeypatch.setitem(sys.modules, f"matplotlib.{module}", None)
    table = pd.DataFrame({"fisher_trace": [1.0], "fisher_mean": [1.0]}, index=["first"])
    with pytest.raises(ImportError, match=r"torch-secorder\[plot\]"):
        picture(table)
