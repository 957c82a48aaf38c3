"""What reports look like on a terminal and in a notebook."""

import math

import pandas as pd
import pytest
import torch
from torch import nn

from torch_secorder import FisherMonitor, fisher_report
from torch_secorder.errors import LifecycleError
from torch_secorder.results.text import summary
from torch_secorder.tables import read_report


def watched() -> FisherMonitor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3))
    with FisherMonitor(model) as monitor:
        for _ in range(2):
            nn.functional.cross_entropy(model(torch.randn(16, 20)), torch.randint(3, (16,))).backward()
    return monitor


def test_a_row_says_what_the_report_says() -> None:
    monitor = watched()
    report = monitor.report()
    lines = monitor.summary(width=100).splitlines()
    assert lines[0].split() == [
        *("parameter", "layer", "shape", "numel", "fisher_trace", "±", "stderr", "per", "weight", "share")
    ]
    for line, (name, row) in zip(lines[1:], report.iterrows(), strict=False):
        cells = line.split()
        assert cells[:4] == [name, "Linear", "x".join(map(str, row["shape"])), f"{row['numel']:,}"]
        assert [float(cell) for cell in cells[4:7]] == pytest.approx(
            [row["fisher_trace"], row["fisher_trace_stderr"], row["fisher_mean"]], rel=0.05, abs=6e-4
        )
        assert cells[7] == f"{row['fisher_trace_share']:.1%}"
    assert max(lines, key=lambda line: line.count("█")).startswith(report["fisher_trace"].idxmax())


def test_the_total_has_the_error_of_the_sums_over_the_model() -> None:
    monitor = watched()
    whole = monitor.report(by=lambda name: "model").loc["model"]
    for by in (None, "module", "type"):
        total, facts = monitor.summary(by).splitlines()[-2:]
        assert total == (f"Fisher trace of the model: {whole['fisher_trace']:.4g} ± {whole['fisher_trace_stderr']:.3g}")
        assert facts == "empirical Fisher, mean over 32 samples in 2 batches"


@pytest.mark.parametrize("width", range(20, 101, 5))
def test_it_is_no_wider_than_asked(width: int) -> None:
    table = watched().summary(width=width).partition("\n\n")[0]
    names_and_numbers = 42  # below this, nothing can be left out any more
    assert max(map(len, table.splitlines())) <= max(width, names_and_numbers)
    assert "fisher_trace" in table


def test_long_names_are_cut_in_the_middle() -> None:
    model = nn.Module()
    model.encoder_with_a_long_name = nn.ModuleDict({"attention_projection": nn.Linear(2, 2, bias=False)})
    inner = model.encoder_with_a_long_name["attention_projection"]
    model.forward = lambda x: inner(x)  # type: ignore[method-assign]
    report = fisher_report(model, nn.MSELoss(), (torch.randn(4, 2), torch.randn(4, 2)), progress=False)
    row = summary(report, width=60).splitlines()[1]
    assert "…" in row
    assert row.startswith("encoder")
    assert "projection.weight " in row
    assert len(row) <= 60


def renamed(names: list[str]) -> pd.DataFrame:
    """A report whose rows have these names."""
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in names))
    report = fisher_report(model, nn.MSELoss(), (torch.randn(4, 3), torch.randn(4, 3)), progress=False)
    report.index = pd.Index(names, name="parameter")
    return report


def labels(names: list[str], width: int) -> list[str]:
    return [line.split()[0] for line in summary(renamed(names), width=width).splitlines()[1 : len(names) + 1]]


LORA = [
    f"base_model.model.model.layers.{layer}.self_attn.{name}_proj.lora_{side}.default.weight"
    for layer in (0, 1, 11)
    for name in "qv"
    for side in "AB"
]


@pytest.mark.parametrize("others", [[], ["lm_head.weight"], ["base_model.model.lm_head.weight"]])
@pytest.mark.parametrize("width", [20, 40, 60, 80, 100])
def test_names_stay_different(width: int, others: list[str]) -> None:
    names = [*LORA, *others]
    assert len(set(labels(names, width))) == len(names)


def test_what_all_names_share_goes_first() -> None:
    assert labels(LORA, 80)[:2] == [
        "…0.self_attn.q_proj.lora_A.default.weight",
        "…0.self_attn.q_proj.lora_B.default.weight",
    ]
    assert labels(LORA, 70)[:2] == ["…0.self_attn.q_proj.lora_A…", "…0.self_attn.q_proj.lora_B…"]


def test_errors_of_one_column_are_written_alike() -> None:
    report = renamed(["a", "b", "c"])
    report["fisher_trace"] = [0.5, 0.0002, 0.1]
    report["fisher_trace_stderr"] = [0.0123, 3.7e-05, 0.002]
    cells = [line.split()[-3] for line in summary(report, width=60).splitlines()[1:4]]
    assert cells == ["1.2e-02", "3.7e-05", "2.0e-03"]


def test_what_was_left_out_is_told() -> None:
    report = watched().report()
    report.attrs |= {"skipped_passes": 1, "n_skipped": 3}
    assert summary(report).endswith("1 refused pass left out, 3 samples with non-finite gradients left out")


@pytest.mark.parametrize("factor", [1e-12, 1e-6, 1e-3, 1.0, 1e3, 1e9, 1e20])
def test_numbers_of_any_size_can_be_read(factor: float) -> None:
    report = watched().report()
    report["fisher_trace"] *= factor
    cells = [line.split()[4] for line in summary(report, width=100).splitlines()[1:5]]
    for cell, value in zip(cells, report["fisher_trace"], strict=True):
        assert len(cell) <= 12
        assert float(cell.replace(",", "")) == pytest.approx(value, rel=0.06)


def test_a_model_without_curvature_has_no_bars() -> None:
    model = nn.Linear(2, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    with FisherMonitor(model) as results:
        nn.functional.mse_loss(model(torch.ones(4, 2)), torch.zeros(4, 2)).backward()
    text = results.summary()
    assert "█" not in text
    assert "nan" not in text
    assert math.isnan(results.report().loc["weight", "fisher_trace_share"])


def test_a_notebook_shows_the_table_or_that_there_is_none() -> None:
    monitor = watched()
    for shown in (monitor, monitor.results):
        page = shown._repr_html_()
        assert page.count("<tr>") == 5
        assert "Fisher trace of the model" in page
    monitor.reset()
    assert "0 samples" in monitor._repr_html_()
    with pytest.raises(LifecycleError, match="no sample"):
        monitor.summary()


def test_a_file_keeps_the_error_of_the_total(tmp_path) -> None:
    report = watched().report()
    report.assign(**report.attrs).to_csv(tmp_path / "report.csv")
    assert summary(read_report(tmp_path / "report.csv")) == summary(report)
