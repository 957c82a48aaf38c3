"""The command line: what it prints and writes, what it refuses in words, and that no file is left half written."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import torch_secorder
from processes import fresh
from torch_secorder import FisherMonitor, fisher_report
from torch_secorder.cli import main
from torch_secorder.cli.files import _png, _umask
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


def unlabeled():
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


def normalized():
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


def dropped():
    model, loss, data = build()
    return torch.nn.Sequential(*model, torch.nn.Dropout(0.5)), loss, data


def empty():
    return *build()[:2], []


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.scale


def wrong_rule():
    from torch_secorder import register_rule
    from torch_secorder.per_sample import Dense

    @register_rule(Scale)
    def twice(module, call):
        return {"scale": Dense(2 * call.inputs[0] * call.grad_output)}

    model, loss, data = build()
    return nn.Sequential(Scale(), *model), loss, data


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 6), nn.Linear(6, 7)

    def forward(self, ids, labels=None):
        logits = self.head(torch.tanh(self.embedding(ids)).cumsum(1))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def named():
    torch.manual_seed(0)
    ids = torch.randint(7, (6, 5))
    labels = ids.where(torch.arange(5) < torch.tensor([5, 3, 4, 2, 1, 5])[:, None], -100)

    def loss(outputs, targets):
        return nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), targets.flatten())

    return Tagger(), loss, {"ids": ids, "labels": labels}


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
        assert f"{row['fisher_trace']:.4f}" in line
        assert f"{row['fisher_trace_share']:.1%}" in line
    assert written(folder) == {"report.csv", "report.json", "report.html", "report.png"}

    table = pd.read_csv("report.csv", index_col="parameter")
    assert list(table["fisher_trace"]) == pytest.approx(list(report["fisher_trace"]), rel=1e-5)
    assert set(table["reduction"]) == {"mean"}
    assert set(table["fisher"]) == {"empirical"}
    assert set(table["n_samples"]) == {12}
    facts = read_report("report.csv").attrs
    assert facts.pop("total_stderr") == pytest.approx(report.attrs.pop("total_stderr"), rel=1e-5)
    assert facts == report.attrs | {"n_passes": 2}
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
    assert Path("report.csv").stat().st_mode & 0o777 == 0o666 & ~_umask()


@pytest.mark.parametrize(("by", "rows"), [("module", ["0", "2"]), ("type", ["Linear"]), ("model", ["model"])])
def test_groups(by: str, rows: list[str], folder: Path) -> None:
    assert (
        main(["report", "setup_me.py:build", "--by", by, "--csv", "a.csv", "--html", "a.html", "--png", "a.png"]) == 0
    )
    table = pd.read_csv("a.csv", dtype={"module": str})
    assert list(table.iloc[:, 0].astype(str)) == rows
    assert table["fisher_trace"].sum() == pytest.approx(expected()["fisher_trace"].sum(), rel=1e-5)


def test_options_reach_the_library(folder: Path) -> None:
    assert main(["report", "setup_me.py:unlabeled", "--fisher", "exact", "--json", "a.json", "--max-batches", "1"]) == 0
    content = json.loads(Path("a.json").read_text())
    assert (content["fisher"], content["n_samples"]) == ("exact", 8)
    sampled = ["--fisher", "sampled", "--num-samples", "2", "--seed", "3", "--loss-type", "mse"]
    assert main(["report", "setup_me.py:unlabeled", *sampled, "--csv", "b.csv"]) == 0
    assert set(pd.read_csv("b.csv")["fisher"]) == {"sampled"}


def test_a_number_of_samples(folder: Path) -> None:
    assert main(["report", "setup_me.py:build", "--max-samples", "10", "--csv", "a.csv"]) == 0
    found = read_report("a.csv")
    assert found.attrs["n_samples"] == 10
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    x, y = torch.randn(12, 4), torch.randint(3, (12,))
    first = fisher_report(model, torch.nn.CrossEntropyLoss(), (x[:10], y[:10]), progress=False)
    assert list(found["fisher_trace"]) == pytest.approx(list(first["fisher_trace"]), rel=1e-5)


def test_a_shift(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last position has no label then, so that there is less in the same batch."""
    options = ["report", "setup_me.py:named", "--fisher", "exact", "--labels", "labels", "--class-axis", "-1"]
    totals = []
    for more in ([], ["--shift"]):
        assert main([*options, *more, "--csv", "a.csv"]) == 0
        totals.append(read_report("a.csv")["fisher_trace"].sum())
    assert totals[1] < 0.9 * totals[0]
    assert main(["report", "setup_me.py:named", "--labels", "labels", "--shift"]) == 1
    assert "shift=True is for labels of a likelihood" in capsys.readouterr().err


def test_the_diagonal_in_a_file(folder: Path) -> None:
    import safetensors.torch

    assert main(["report", "setup_me.py:build", "--diagonal", "fisher.safetensors", "--csv", "a.csv"]) == 0
    found = safetensors.torch.load_file("fisher.safetensors")
    table = pd.read_csv("a.csv", index_col="parameter")
    shapes = {"0.weight": (5, 4), "0.bias": (5,), "2.weight": (3, 5), "2.bias": (3,)}
    assert {name: tuple(value.shape) for name, value in found.items()} == shapes
    for name, value in found.items():
        assert float(value.sum()) == pytest.approx(table.loc[name, "fisher_trace"], rel=1e-5)


def test_axes_and_memory_reach_the_library(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def trace(setup: str, *options: str) -> float:
        assert main(["report", f"axes.py:{setup}", *options, "--csv", "b.csv"]) == 0
        return float(pd.read_csv("b.csv")["fisher_trace"].sum())

    (folder / "axes.py").write_text(AXES)
    exact = ["--fisher", "exact", "--max-memory", "64"]
    expected = trace("plain", *exact)
    last = [*exact, "--class-axis", "-1"]
    assert trace("classes_last", *last) == pytest.approx(expected, rel=1e-5)
    assert trace("samples_second", *last, "--batch-axis", "1") == pytest.approx(expected, rel=1e-5)
    ignoring = trace("classes_last", *last, "--ignore-index", "0")
    assert ignoring == pytest.approx(trace("zeros_left_out", *last), rel=1e-5)
    assert ignoring < 0.9 * expected
    capsys.readouterr()
    assert main(["report", "axes.py:plain", "--batch-axis", "-1"]) == 2
    assert "--batch-axis" in capsys.readouterr().err
    assert main(["report", "axes.py:plain", "--seed", str(2**64)]) == 2
    assert "--seed" in capsys.readouterr().err
    assert main(["check", "axes.py:samples_second", "--batch-axis", "1", "--max-memory", "64"]) == 0


AXES = """
import torch
from torch import nn


class Axes(nn.Module):
    def __init__(self, classes_axis, batch_axis):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.classes_axis, self.batch_axis = nn.Linear(4, 3), classes_axis, batch_axis

    def forward(self, x):
        return self.layer(x).movedim(-1, self.classes_axis)


def loss(f, y):
    return nn.functional.cross_entropy(f.flatten(0, 1), y.flatten(), reduction="sum")


def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 5, 4, generator=generator), torch.randint(3, (6, 5), generator=generator)


def plain():
    return Axes(1, 0), None, data()


def classes_last():
    return Axes(-1, 0), loss, data()


def samples_second():
    x, y = data()
    return Axes(-1, 1), loss, (x.transpose(0, 1), y.T)


def zeros_left_out():
    x, y = data()
    return Axes(-1, 0), loss, (x, y.masked_fill(y == 0, -100))
"""


def test_a_precision(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "setup_me.py:build", "--rtol", "0.5", "--csv", "a.csv"]) == 0
    assert ", the data ended at a standard error of" in capsys.readouterr().out
    assert read_report("a.csv").attrs["rtol"] == 0.5
    (folder / "more.py").write_text(
        "from setup_me import build\n\ndef many():\n    model, loss, data = build()\n    return model, loss, data * 50\n"
    )
    assert main(["report", "more.py:many", "--rtol", "0.1", "--rtol-of", "rows"]) == 0
    assert re.search(r"stopped at a standard error of \d\.\d% of every row, 10\.0% asked for", capsys.readouterr().out)
    one = "def one():\n    model, loss, ((x, y), _) = build()\n    return model, loss, (x[:1], y[:1])\n"
    (folder / "one.py").write_text(f"from setup_me import build\n\n{one}")
    assert main(["report", "one.py:one", "--rtol", "0.1", "--json", "one.json"]) == 0
    assert json.loads(Path("one.json").read_text())["relative_stderr"] is None
    capsys.readouterr()
    assert main(["report", "setup_me.py:build", "--rtol", "-1"]) == 1
    assert "rtol must be a positive number" in capsys.readouterr().err


def test_a_device_that_is_none_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "setup_me.py:build", "--device", "nowhere"]) == 2
    assert "'nowhere' is not a device of torch's" in capsys.readouterr().err


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
        (["setup_me.py:normalized"], "CoupledSamplesError"),
        (["setup_me.py:wrong_shape"], "the model, the loss or the data of setup_me.py:wrong_shape failed"),
        (["setup_me.py:unlabeled"], 'fisher="empirical" needs a loss_fn'),
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
    assert "Usage: torch-secorder" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "-1", "1.5", "x"])
def test_counts_are_positive(count: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "setup_me.py:build", f"--max-batches={count}"]) == 2
    assert "Invalid value for '--max-batches'" in capsys.readouterr().err


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
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["report", "setup_me.py:build", "--png", "a.png"]) == 1
    assert "pip install 'torch-secorder[plot]'" in capsys.readouterr().err


@pytest.mark.slow  # It draws a large picture.
def test_a_picture_of_many_rows_has_the_largest(folder: Path) -> None:
    report = expected()
    many = pd.concat([report.rename(f"{k}.{{}}".format) for k in range(60)])
    many.attrs.update(report.attrs)
    tall, short = _png(many), _png(report)
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


def test_compare_says_where_nothing_changed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (build,) = reports("build")
    Path("copy.csv").write_bytes(Path(build).read_bytes())
    capsys.readouterr()
    assert main(["compare", build, "copy.csv"]) == 0
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("after, unchanged")
    assert "times" not in printed


def test_tables_and_statistics_go_to_their_own_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "setup_me.py:build", "--csv", "a.csv", "--save", "a.safetensors"]) == 0
    capsys.readouterr()
    assert main(["compare", "a.csv", "a.safetensors"]) == 1
    assert (
        "compare reads what --csv wrote; statistics that --save wrote go to torch-secorder merge"
        in capsys.readouterr().err
    )
    assert main(["merge", "a.safetensors", "a.csv"]) == 1
    assert (
        "merge reads what --save wrote; tables that --csv wrote go to torch-secorder compare" in capsys.readouterr().err
    )
    assert main(["compare", "a.csv", "a.csv"]) == 0
    assert main(["merge", "a.safetensors"]) == 0


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


def test_parameters_are_chosen_by_a_word_or_a_pattern(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "setup_me.py:build", "--parameters", "*.weight", "--csv", "a.csv"]) == 0
    names = list(pd.read_csv(folder / "a.csv", index_col="parameter").index)
    assert names
    assert all(name.endswith(".weight") for name in names)
    assert main(["report", "setup_me.py:build", "--parameters", "*.wait"]) == 1
    assert "*.wait" in capsys.readouterr().err


@pytest.mark.slow
def test_check_shows_both_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "setup_me.py:build"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "the library and the loop agree (empirical Fisher, mean over 8 samples)" in printed.out
    report = pd.read_csv(_first_batch(folder), index_col="parameter")
    for name, trace in report["fisher_trace"].items():
        (line,) = [line for line in printed.out.splitlines() if line.startswith(f"{name} ")]
        assert line.split()[1:3] == [f"{trace:.4g}"] * 2
        assert line.endswith("equal")
    assert main(["check", "setup_me.py:dropped", "--seed", "1", "--parameters", "all"]) == 0
    assert "8 samples, in eval mode" in capsys.readouterr().out


def test_batches_with_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model's own loss and the same loss outside of it are the same, in report and in check."""
    traces = []
    for options in (["--labels", "labels"], ["--loss", "model"]):
        assert main(["report", "setup_me.py:named", *options, "--csv", "named.csv"]) == 0
        traces.append(list(read_report("named.csv")["fisher_trace"]))
        assert main(["check", "setup_me.py:named", *options]) == 0
        assert "the library and the loop agree (empirical Fisher, mean over 6 samples)" in capsys.readouterr().out
    assert traces[0] == pytest.approx(traces[1], rel=1e-5)
    assert main(["report", "setup_me.py:named", "--labels", "targets"]) == 1
    assert "has no such entry; it has ids, labels" in capsys.readouterr().err
    assert main(["check", "setup_me.py:build", "--loss", "model"]) == 1
    assert "without a loss" in capsys.readouterr().err
    assert main(["report", "setup_me.py:named", "--loss", "mine"]) == 2


def _first_batch(folder: Path) -> Path:
    assert main(["report", "setup_me.py:build", "--max-batches", "1", "--csv", "first.csv"]) == 0
    return folder / "first.csv"


def test_check_fails_where_the_library_is_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "setup_me.py:wrong_rule", "--no-verify"]) == 1
    printed = capsys.readouterr()
    assert "THE LIBRARY AND THE LOOP DIFFER" in printed.out
    assert printed.err == "torch-secorder: parameter 0.scale: the library and the loop differ\n"
    assert main(["check", "setup_me.py:wrong_rule"]) == 1
    assert "VerificationError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        ("empty", "has no batch"),
        ("normalized", "CoupledSamplesError"),
        ("unlabeled", "loss_fn must be a module or a function"),
        ("wrong_shape", "the model, the loss or the data of setup_me.py:wrong_shape failed"),
    ],
)
def test_check_refuses_in_words(setup: str, words: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"setup_me.py:{setup}"]) == 1
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.out == ""


@pytest.mark.slow  # It starts processes.
def test_it_is_a_command(folder: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "torch_secorder"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    run = {"capture_output": True, "text": True, "env": environment, "timeout": 100}
    version = subprocess.run([*command, "--version"], **run)  # type: ignore[call-overload]
    assert (version.returncode, version.stdout) == (0, "torch-secorder 0.1.0\n")
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.scripts]\ntorch-secorder = "torch_secorder.cli:main"\n' in pyproject


# Statistics that are saved, gone on with, and merged

LONG = """
import os

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def build(shuffle=True, start=0, stop=30, seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 3)).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (30,), generator=generator)
    data = TensorDataset(x[start:stop], y[start:stop])
    return model, nn.CrossEntropyLoss(), DataLoader(data, batch_size=4, shuffle=shuffle)


def stops():
    model, loss, loader = build()

    def batches():
        for number, batch in enumerate(loader):
            if number == 5:
                raise KeyboardInterrupt
            yield batch

    return model, loss, batches()


def dies():
    model, loss, loader = build()

    def batches():
        for number, batch in enumerate(loader):
            if number == 5:
                os._exit(9)  # as if killed
            yield batch

    return model, loss, batches()


def ordered():
    model, loss, loader = build(shuffle=False, seed=0)
    return model.eval(), loss, loader


def first():
    model, loss, loader = build(shuffle=False, stop=12, seed=0)
    return model.eval(), loss, loader


def second():
    model, loss, loader = build(shuffle=False, start=12, seed=0)
    return model.eval(), loss, loader


def others():
    model, loss, loader = build(shuffle=False, seed=5)
    return model.eval(), loss, loader


def reversed():
    model, loss, loader = ordered()
    return model, loss, list(loader)[::-1]
"""


@pytest.fixture
def long(folder: Path) -> Path:
    (folder / "long.py").write_text(LONG)
    return folder


def states(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".csv") or path.name[0] == "."}


def run_in(folder: Path, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    sys.exit(main(arguments))


@pytest.mark.slow
@pytest.mark.parametrize("fisher", ["empirical", "sampled", "exact"])
def test_a_killed_run_goes_on_to_the_same_table(fisher: str, long: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a shuffled loader, dropout and drawn labels, so that every random state matters."""
    options = ["--fisher", fisher, "--seed", "7"]
    save = ["--save", "state.safetensors", "--every", "2", "--resume"]
    assert main(["report", "long.py:build", *options, "--csv", "whole.csv"]) == 0
    killed = fresh().Process(target=run_in, args=(long, ["report", "long.py:dies", *options, *save, "--csv", "a.csv"]))
    killed.start()
    killed.join(timeout=100)
    assert killed.exitcode == 9
    assert states(long) == {"whole.csv", "state.safetensors"}
    assert FisherMonitor.load("state.safetensors").n_samples == 16
    capsys.readouterr()
    assert main(["report", "long.py:build", *options, *save, "--csv", "a.csv"]) == 0
    printed = capsys.readouterr().out
    assert Path("a.csv").read_bytes() == Path("whole.csv").read_bytes()
    assert "30 samples in 8 batches" in printed
    assert main(["report", "long.py:build", *options, *save, "--csv", "b.csv"]) == 0, "a run that is over says the same"
    assert Path("b.csv").read_bytes() == Path("whole.csv").read_bytes()
    assert capsys.readouterr().out == printed


def test_an_interrupted_run_says_where_it_is(long: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save = ["--save", "state.safetensors", "--every", "2", "--seed", "7"]
    assert main(["report", "long.py:stops", *save, "--csv", "a.csv"]) == 130
    assert "state.safetensors has 4 batches: pass --resume to go on" in capsys.readouterr().err
    assert states(long) == {"state.safetensors"}
    assert main(["report", "long.py:build", *save]) == 1
    assert "is there already: pass --resume to go on from it, or remove it" in capsys.readouterr().err


def test_a_run_goes_on_with_the_same_thing_only(long: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save = ["--save", "state.safetensors", "--resume"]
    assert main(["report", "long.py:ordered", *save, "--max-batches", "3"]) == 0
    before = Path("state.safetensors").read_bytes()
    capsys.readouterr()
    for setup, options, words in (
        ("ordered", ["--fisher", "exact"], "of a run with --fisher empirical, not exact"),
        ("ordered", ["--seed", "2"], "of a run with --seed None, not 2"),
        ("others", [], "of a model with other weights: SETUP must build the same model every time"),
        ("reversed", [], "has counted 3 batches, but these are others: the data must come in the same order"),
        ("ordered", ["--max-batches", "2"], "has counted 3 batches, but the data end after 2"),
    ):
        assert main(["report", f"long.py:{setup}", *save, *options, "--csv", "a.csv"]) == 1, words
        assert words in capsys.readouterr().err
        assert states(long) == {"state.safetensors"}
        assert Path("state.safetensors").read_bytes() == before
    for content, words in (
        (before[:-9], "is not a whole file of this library"),
        (b"parameter,fisher_trace\n", "is not a whole file of this library"),
    ):
        Path("state.safetensors").write_bytes(content)
        assert main(["report", "long.py:ordered", *save]) == 1
        assert words in capsys.readouterr().err
        assert Path("state.safetensors").read_bytes() == content
    linear = torch.nn.Linear(2, 2)
    with FisherMonitor(linear) as monitor:
        torch.nn.functional.cross_entropy(linear(torch.randn(3, 2)), torch.tensor([0, 1, 1])).backward()
    Path("state.safetensors").unlink()
    monitor.save("state.safetensors")
    assert main(["report", "long.py:ordered", *save]) == 1
    assert "torch-secorder report --save did not write it" in capsys.readouterr().err
    assert main(["report", "long.py:ordered", "--resume"]) == 2
    assert "--every and --resume need --save STATE" in capsys.readouterr().err
    assert main(["report", "long.py:ordered", "--save", "a.csv", "--csv", "a.csv"]) == 1
    assert "it is given for two files" in capsys.readouterr().err


def test_runs_over_parts_of_the_data_merge(long: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "long.py:ordered", "--csv", "whole.csv"]) == 0
    whole = capsys.readouterr().out
    for part in ("first", "second"):
        assert main(["report", f"long.py:{part}", "--save", f"{part}.safetensors"]) == 0
    capsys.readouterr()
    parts = ["first.safetensors", "second.safetensors"]
    assert main(["merge", *parts, "--csv", "merged.csv", "--html", "merged.html", "--save", "all.safetensors"]) == 0
    assert capsys.readouterr().out == whole
    pd.testing.assert_frame_equal(read_report("merged.csv"), read_report("whole.csv"), rtol=1e-12)
    assert Path("merged.html").read_text().startswith("<!DOCTYPE html>")
    assert main(["merge", "all.safetensors", "--by", "model"]) == 0
    assert "over 30 samples in 8 batches" in capsys.readouterr().out


def test_what_does_not_merge(long: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for setup, options in (
        ("long.py:first", []),
        ("long.py:second", ["--fisher", "exact"]),
        ("long.py:others", []),
        ("setup_me.py:summed", []),
        ("setup_me.py:build", []),
    ):
        name = setup.split(":")[1]
        assert main(["report", setup, *options, "--save", f"{name}.safetensors"]) == 0
    Path("copy.safetensors").write_bytes(Path("first.safetensors").read_bytes())
    Path("torn.safetensors").write_bytes(Path("first.safetensors").read_bytes()[:-9])
    Path("foreign.safetensors").write_text("parameter,fisher_trace\n")
    capsys.readouterr()
    for other, words in (
        ("copy", "are the same statistics, which must not be counted twice"),
        ("torn", "torn.safetensors is not a whole file"),
        ("foreign", "foreign.safetensors is not a whole file"),
        ("missing", "there is no file missing.safetensors"),
        ("second", "second.safetensors can't be merged with those before it: cannot merge fisher='exact'"),
        ("summed", "cannot merge reduction='sum' into reduction='mean'"),
        ("build", "these statistics are of different parameters; the first difference is 2.bias"),
        ("others", "others.safetensors is of other weights than first.safetensors"),
    ):
        assert main(["merge", "first.safetensors", f"{other}.safetensors", "--csv", "a.csv", "--save", "b"]) == 1, other
        assert words in capsys.readouterr().err
        assert not Path("a.csv").exists()
        assert not Path("b").exists()
    assert main(["merge"]) == 2
    assert "Missing argument 'STATE...'" in capsys.readouterr().err


def test_sampled_labels_follow_the_seed(long: Path) -> None:
    for name in ("a", "b"):
        assert main(["report", "long.py:ordered", "--fisher", "sampled", "--seed", "3", "--csv", f"{name}.csv"]) == 0
    assert Path("a.csv").read_bytes() == Path("b.csv").read_bytes()


def test_without_click(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "torch_secorder.cli.commands", raising=False)
    monkeypatch.setitem(sys.modules, "click", None)
    assert main(["--version"]) == 1
    assert "the command needs click: pip install 'torch-secorder[cli]'" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in ((["--help"], "report"), (["report", "--help"], "--resume"), (["merge", "-h"], "STATE...")):
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        assert words in printed
        assert "130 interrupted" in " ".join(printed.split())


def test_the_version_is_that_of_the_package() -> None:
    assert torch_secorder.__version__ == importlib.metadata.version("torch-secorder")
