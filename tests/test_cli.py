"""The command line: what it prints and writes, what it refuses in words, and that no file is left half written."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from torch_secorder import cli, fisher_report
from torch_secorder.cli import main
from torch_secorder.tables import read_report

SETUP = """
import torch
from torch import nn

from sizes import WIDTH


def build(scale=1.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3))
    with torch.no_grad():
        model[2].weight.mul_(scale)
    x, y = torch.randn(12, 4), torch.randint(3, (12,))
    return model, nn.CrossEntropyLoss(), [(x[:8], y[:8]), (x[8:], y[8:])]


def doubled():
    return build(2.0)


def unlabelled():
    model, _, data = build()
    return model, None, [(x, None) for x, _ in data]


def summed():
    model, _, data = build()
    return model, nn.CrossEntropyLoss(reduction="sum"), data


def fewer():
    model, _, data = build()
    return model, nn.CrossEntropyLoss(reduction="sum"), data[:1]


def other():
    return nn.Linear(2, 2), nn.CrossEntropyLoss(), (torch.randn(4, 2), torch.randint(2, (4,)))


def pair():
    return build()[:2]


def no_module():
    return "model", None, []


def fails():
    raise KeyError("weights.pt")


def leaves():
    raise SystemExit(3)


def normalised():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    return model, nn.CrossEntropyLoss(), build()[2]


def wrong_shape():
    model, loss, data = build()
    return model, loss, [(x[:, :2], y) for x, y in data]


def interrupted():
    model, loss, data = build()

    def batches():
        yield data[0]
        raise KeyboardInterrupt

    return model, loss, batches()


constant = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "setup_me.py").write_text(SETUP)
    (tmp_path / "sizes.py").write_text("WIDTH = 5\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "sizes", raising=False)
    return tmp_path


def written(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"setup_me.py", "sizes.py", "__pycache__"}


def expected(**options: object) -> pd.DataFrame:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    x, y = torch.randn(12, 4), torch.randint(3, (12,))
    loss = torch.nn.CrossEntropyLoss()
    return fisher_report(model, loss, (x, y), progress=False, **options)  # type: ignore[arg-type]


def test_report_prints_and_writes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [f"--{form}=report.{form}" for form in ("csv", "json", "html", "png")]
    path = list(sys.path)
    assert main(["report", "setup_me.py:build", *files]) == 0
    assert sys.path == path
    printed = capsys.readouterr()
    report = expected()
    assert printed.err == ""
    assert "empirical Fisher, mean over 12 samples in 2 batches" in printed.out
    assert f"Fisher trace of the model: {report['fisher_trace'].sum():.4g}" in printed.out
    for name, row in report.iterrows():
        (line,) = [line for line in printed.out.splitlines() if line.startswith(f"{name} ")]
        assert f"{row['fisher_trace']:.4g}" in line
        assert f"{row['fisher_trace_share']:.1%}" in line
    assert written(folder) == {"report.csv", "report.json", "report.html", "report.png"}

    table = pd.read_csv("report.csv", index_col="parameter")
    assert list(table["fisher_trace"]) == pytest.approx(list(report["fisher_trace"]), rel=1e-5)
    assert set(table["reduction"]) == {"mean"}
    assert set(table["fisher"]) == {"empirical"}
    assert set(table["n_samples"]) == {12}
    assert read_report("report.csv").attrs == report.attrs | {"n_passes": 2}
    content = json.loads(Path("report.json").read_text())
    assert (content["n_samples"], content["n_passes"], content["reduction"]) == (12, 2, "mean")
    assert [row["fisher_trace"] for row in content["rows"]] == pytest.approx(list(report["fisher_trace"]), rel=1e-5)
    assert content["rows"][0]["shape"] == [5, 4]
    assert content["rows"][0]["grad_sq_norm"] is None
    page = Path("report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "0.weight" in page
    assert "mean over 12 samples" in page
    assert Path("report.png").read_bytes().startswith(b"\x89PNG")
    assert Path("report.csv").stat().st_mode & 0o777 == 0o666 & ~cli._umask()


@pytest.mark.parametrize(("by", "rows"), [("module", ["0", "2"]), ("type", ["Linear"]), ("model", ["model"])])
def test_groups(by: str, rows: list[str], folder: Path) -> None:
    assert (
        main(["report", "setup_me.py:build", "--by", by, "--csv", "a.csv", "--html", "a.html", "--png", "a.png"]) == 0
    )
    table = pd.read_csv("a.csv", dtype={"module": str})
    assert list(table.iloc[:, 0].astype(str)) == rows
    assert table["fisher_trace"].sum() == pytest.approx(expected()["fisher_trace"].sum(), rel=1e-5)


def test_options_reach_the_library(folder: Path) -> None:
    assert (
        main(["report", "setup_me.py:unlabelled", "--fisher", "exact", "--json", "a.json", "--max-batches", "1"]) == 0
    )
    content = json.loads(Path("a.json").read_text())
    assert (content["fisher"], content["n_samples"]) == ("exact", 8)
    sampled = ["--fisher", "sampled", "--num-samples", "2", "--seed", "3", "--loss-type", "mse"]
    assert main(["report", "setup_me.py:unlabelled", *sampled, "--csv", "b.csv"]) == 0
    assert set(pd.read_csv("b.csv")["fisher"]) == {"sampled"}


def test_progress_bar(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "setup_me.py:build", "--progress"]) == 0
    assert "Fisher:" in capsys.readouterr().err
    assert main(["report", "setup_me.py:build", "--no-progress"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.py:build"], "there is no file nowhere.py"),
        (["setup_me.py:biuld"], "no function biuld; it defines build, doubled"),
        (["setup_me.py:constant"], "no function constant"),
        (["setup_me.py:pair"], r"must return (model, loss, data), not 2 values"),
        (["setup_me.py:no_module"], "must return a torch.nn.Module first, not str"),
        (["setup_me.py:fails"], "KeyError: 'weights.pt'"),
        (["setup_me.py:leaves"], "SystemExit: 3"),
        (["setup_me.py:normalised"], "CoupledSamplesError"),
        (["setup_me.py:wrong_shape"], "the model, the loss or the data of setup_me.py:wrong_shape failed"),
        (["setup_me.py:unlabelled"], 'fisher="empirical" needs a loss_fn'),
        (["setup_me.py:build", "--num-samples", "2"], 'num_samples is for fisher="sampled"'),
        (["setup_me.py:build", "--json", "no/a.json"], "cannot write no/a.json: it is in no/, which does not exist"),
        (["setup_me.py:build", "--html", "."], "it is a folder"),
    ],
)
def test_failures_say_why_and_write_nothing(
    arguments: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *arguments, "--csv", "a.csv"]) == 1
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.out == ""
    assert written(folder) == set()


def test_a_file_that_does_not_import(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, words in (("import numpyy\n", "No module named 'numpyy'"), ("def build(:\n", "SyntaxError")):
        Path("broken.py").write_text(content)
        assert main(["report", "broken.py:build"]) == 1
        error = capsys.readouterr().err
        assert "broken.py does not import" in error
        assert words in error
        assert "_setup_broken" not in sys.modules


@pytest.mark.parametrize(
    "arguments",
    [[], ["report"], ["report", "setup_me.py"], ["report", "a:b"], ["report", "setup_me.py:build", "--by", "layer"]],
)
def test_a_wrong_command_line(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "usage: torch-secorder" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "-1", "1.5", "x"])
def test_counts_are_positive(count: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "setup_me.py:build", f"--max-batches={count}"]) == 2
    assert "is not a positive integer" in capsys.readouterr().err


def test_interruption(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "setup_me.py:interrupted", "--csv", "a.csv"]) == 130
    assert written(folder) == set()


def test_no_file_is_left_half_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.csv").write_text("what was there before\n")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device", "a.json")

    with monkeypatch.context() as patch:
        patch.setattr(os, "chmod", full)
        assert main(["report", "setup_me.py:build", "--csv", "a.csv", "--json", "a.json"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert written(folder) == {"a.csv"}
    assert Path("a.csv").read_text() == "what was there before\n"


def test_without_matplotlib(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert main(["report", "setup_me.py:build", "--png", "a.png"]) == 1
    assert "pip install 'torch-secorder[plot]'" in capsys.readouterr().err


def test_a_picture_of_many_rows_has_the_largest(folder: Path) -> None:
    report = expected()
    many = pd.concat([report.rename(f"{k}.{{}}".format) for k in range(60)])
    many.attrs.update(report.attrs)
    tall, short = cli._png(many), cli._png(report)
    assert tall.startswith(b"\x89PNG")
    height = [int.from_bytes(picture[20:24], "big") for picture in (tall, short)]
    assert 4000 < height[0] < 5000
    assert height[1] < 500


def reports(*functions: str, options: tuple[str, ...] = ()) -> list[str]:
    files = [f"{function}.csv" for function in functions]
    for function, file in zip(functions, files, strict=True):
        assert main(["report", f"setup_me.py:{function}", "--csv", file, *options]) == 0
    return files


def test_compare(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = reports("build", "doubled")
    capsys.readouterr()
    assert main(["compare", *files, "--csv", "change.csv"]) == 0
    printed = capsys.readouterr().out
    before, after = (pd.read_csv(file, index_col="parameter") for file in files)
    change = pd.read_csv("change.csv", index_col="parameter")
    assert list(change.index) == list(before.index)
    for name, row in change.iterrows():
        a, b = before.loc[name], after.loc[name]
        assert row["ratio"] == pytest.approx(b["fisher_trace"] / a["fisher_trace"], rel=1e-9)
        stderr = math.sqrt(a["fisher_trace_stderr"] ** 2 + b["fisher_trace_stderr"] ** 2)
        assert row["z"] == pytest.approx((b["fisher_trace"] - a["fisher_trace"]) / stderr, rel=1e-9)
        assert f"{row['ratio']:.4g}" in printed
        assert (row["note"] == "rose") == (row["z"] > 2)
    totals = before["fisher_trace"].sum(), after["fisher_trace"].sum()
    assert f"{totals[0]:.4g} before, {totals[1]:.4g} after, {totals[1] / totals[0]:.4g} times" in printed


def test_compare_shows_what_only_one_has(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = reports("build", "doubled")
    lines = Path(files[1]).read_text().splitlines()
    Path(files[1]).write_text("\n".join([lines[0], *lines[2:], "new" + lines[1][1:]]) + "\n")
    capsys.readouterr()
    assert main(["compare", *files]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert next(line for line in printed if line.startswith("0.weight")).endswith("only before")
    assert next(line for line in printed if line.startswith("new.weight")).endswith("only after")


def test_compare_refuses_in_words(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (build, other, summed, fewer) = reports("build", "other", "summed", "fewer")
    assert main(["report", "setup_me.py:build", "--by", "module", "--csv", "modules.csv"]) == 0
    assert main(["report", "setup_me.py:build", "--fisher", "exact", "--csv", "exact.csv"]) == 0
    Path("plain.csv").write_text("parameter,fisher_trace\na,1\n")
    Path("header.csv").write_text(Path(build).read_text().splitlines()[0] + "\n")
    Path("words.csv").write_text(Path(build).read_text().replace(",20,", ",20,zero"))
    Path("binary.csv").write_bytes(b"\xff\xfe\x00")
    capsys.readouterr()
    for pair, words in (
        ((build, "nowhere.csv"), "cannot read nowhere.csv"),
        ((build, other), "have no parameter in common"),
        ((build, summed), "reduction 'mean' and summed.csv 'sum'"),
        ((build, "exact.csv"), "fisher 'empirical' and exact.csv 'exact'"),
        ((summed, fewer), "sums over 12 and 8 samples"),
        ((build, "modules.csv"), "use the same --by"),
        (("plain.csv", build), "plain.csv has no column fisher_trace_stderr, reduction, fisher, n_samples"),
        ((build, "header.csv"), "header.csv has no row"),
        ((build, "words.csv"), "words.csv, line 2: fisher_trace or its stderr is not a number"),
        ((build, "binary.csv"), "binary.csv"),
        ((build, build, "--csv", "no/c.csv"), "cannot write no/c.csv"),
    ):
        assert main(["compare", *pair]) == 1, words
        assert words in capsys.readouterr().err


def test_it_is_a_command(folder: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "torch_secorder.cli"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    run = {"capture_output": True, "text": True, "env": environment, "timeout": 100}
    version = subprocess.run([*command, "--version"], **run)  # type: ignore[call-overload]
    assert (version.returncode, version.stdout) == (0, "torch-secorder 0.1.0\n")
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.scripts]\ntorch-secorder = "torch_secorder.cli:main"\n' in pyproject
