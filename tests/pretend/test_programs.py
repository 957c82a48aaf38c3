"""The command line and the benchmark, on the pretend device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import accelerator, launches, results
from torch_secorder.cli import main
from torch_secorder.tables import read_report

SETUP = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, nn.CrossEntropyLoss(), [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(2)]
"""


def test_the_command_line_brings_the_model_and_the_data_to_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("setup_there.py").write_text(SETUP)
    assert main(["report", "setup_there.py:build", "--csv", "there.csv", "--device", "pretend"]) == 0
    assert main(["report", "setup_there.py:build", "--csv", "here.csv"]) == 0
    here, there = (read_report(f"{where}.csv")["fisher_trace"] for where in ("here", "there"))
    assert there.to_numpy() == pytest.approx(here.to_numpy(), rel=1e-4)
    assert torch.get_default_device().type == "cpu"


def test_launches_and_waits_are_counted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    launches.main(["mlp", "--save", "--places"])
    head, line, *places = capsys.readouterr().out.splitlines()
    assert (head, line[:3]) == (launches.HEAD, "MLP")
    row = json.loads((tmp_path / "launches.json").read_text())["rows"]["mlp"]
    assert 0 < row["plain"] < row["monitored"]
    assert row["per_tensor"] == (row["monitored"] - row["plain"]) / 6
    assert row["waits"] == sum(int(place.split()[0]) for place in places)
    assert row["peak"][0] >= 4 * 256 * 1024  # an activation


def test_the_benchmark_for_accelerators_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(accelerator, "STEPS", 4)
    monkeypatch.setattr(accelerator, "PAGE", tmp_path / "page.rst")
    accelerator.main(["mlp", "--device", "pretend", "--ways", "plain", "monitor_loop", "--save"])
    card, _, *rows = capsys.readouterr().out.splitlines()
    assert (card, len(rows)) == ("pretend", 2)
    saved = json.loads((tmp_path / "accelerator.json").read_text())["rows"]["pretend: mlp"]
    assert saved["plain"]["launches"] < saved["monitor_loop"]["launches"]
    assert saved["plain"]["waits"] == 0
