"""The benchmark runs, and what it times gives the right number. No test asserts a time."""

from __future__ import annotations

import json
import re
import sys

import pytest

pytest.importorskip("transformers")

from benchmarks import check, growth, page, results, speed
from benchmarks.exactness import exact, verdict
from benchmarks.variants import BOUNDS, OURS, VARIANTS
from benchmarks.workloads import WORKLOADS

pytestmark = pytest.mark.filterwarnings("ignore::Warning")
QUICK = [name for name in WORKLOADS if name not in ("wide", "resnet")]  # these are large


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_workload_is_exact(name):
    setting = WORKLOADS[name].setting()
    functional = VARIANTS["functional"]
    found = functional.read(functional.prepare(setting.model, setting.loss_fn)(*setting.batch(2)))
    assert verdict(found, exact(name, 2), rtol=1e-3) == "exact"


@pytest.mark.slow
@pytest.mark.parametrize("bound", BOUNDS.values())
@pytest.mark.parametrize("name", QUICK)
def test_a_bound_is_exact(name, bound):
    setting = WORKLOADS[name].setting()
    step = VARIANTS[bound].prepare(setting.model, setting.loss_fn)
    for _ in range(2):  # The first step tries several ways.
        found = VARIANTS[bound].read(step(*setting.batch(2)))
        assert verdict(found, exact(name, 2), rtol=1e-3) == "exact"


@pytest.mark.slow
def test_it_runs_without_the_peers(capsys, tmp_path, monkeypatch):
    name = "lstm"
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    for package in ("backpack", "opacus", "curvlinops"):
        monkeypatch.setitem(sys.modules, package, None)
    speed.main(["--workloads", name, "--batch", "2", "--repeats", "1", "--save"])
    told = capsys.readouterr().out
    row = json.loads((tmp_path / "speed.json").read_text())["rows"][name]
    assert set(row) == set(VARIANTS)
    assert set(row["plain"]["floor"]) == {"operations", "bytes"}
    assert row["bare"]["verdict"] == ""
    for key in set(VARIANTS) - {"plain", "bare"}:
        start = "exact" if key in (*OURS, *BOUNDS.values(), "vmap", "loop") else "refuses: ModuleNotFoundError"
        assert row[key]["verdict"].startswith(start)
        assert VARIANTS[key].label in told
    assert any(WORKLOADS[name].label in line for line in page.speed({name: row}))


def test_the_page_tells_no_goals():
    row = {"plain": {"milliseconds": 18.0, "mib": 16.0, "floor": {"operations": 0.6, "bytes": 0.7}}}
    row |= {variant: {"ratio": 1.234, "verdict": "exact"} for variant in VARIANTS if variant != "plain"}
    lines = [*page.speed({"mlp": row}), *page.memory({"mlp": row})]
    assert "     - 1.23" in lines
    assert not [line for line in lines if re.search(r"1\.23.*\(", line)]


def test_goals_are_met_or_missed():
    goals = WORKLOADS["mlp"].goals
    assert goals.told("monitor_loop", 1.034) == "goal 1.03 met"
    assert goals.told("functional", 0.65) == "goal 0.64 missed"
    assert goals.told("functional", 0.65, memory=True) == "goal 0.90 met"
    assert goals.told("loop", 9.0) == ""


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"a": 1.0, "b": 2.0}, "exact"),
        ({"total": 3.0}, "exact"),
        ({"total": 3.3}, "wrong, +10 %"),
        ({"a": 1.0}, "1 of 2 parameters"),
        ({"a": 1.0, "b": 1.4}, "wrong, -20 % (b -30 %)"),
        ({"a": 10.0, "b": 2.0}, "wrong, x 4 (a x 10)"),
    ],
)
def test_verdicts(found, expected):
    assert verdict(found, {"a": 1.0, "b": 2.0}) == expected


def test_slopes_are_of_the_larger_half():
    assert growth.slope([1, 2, 4, 8], [7, 7, 16, 64]) == pytest.approx(2)


@pytest.fixture
def measured_ratios(monkeypatch, tmp_path):
    """What the check finds, one mapping for each measurement, instead of what it would measure."""
    found: list[dict[str, float]] = []
    sizes = {name + check.MEMORY: 1.0 for name in check.SIZED}
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(check, "times", lambda workload, variants, rounds, n: found.pop(0))
    monkeypatch.setattr(check, "sizes", lambda workload, variants: sizes)
    return found


def test_what_is_slower_each_time_fails_the_check(measured_ratios, capsys):
    before = {"monitor_loop": 1.0, "monitor": 1.2, "functional": 0.7}
    measured_ratios += [before, before | {"functional": 0.8}, {"functional": 0.74}, {"functional": 0.76}]
    assert check.main(["--workloads", "mlp", "--store"]) == 0
    assert check.main(["--workloads", "mlp"]) == 1
    assert "worse by more than 5%: mlp: functional\n" in capsys.readouterr().out
    assert not measured_ratios


def test_what_is_slower_once_passes_the_check(measured_ratios):
    before = {"monitor_loop": 1.0, "monitor": 1.2, "functional": 0.7}
    measured_ratios += [before, before | {"monitor": 1.4}, {"monitor": 1.23}]
    assert check.main(["--workloads", "mlp", "--store"]) == 0
    assert check.main(["--workloads", "mlp"]) == 0
    assert not measured_ratios


def test_a_bound_stands_beside_its_goal_and_fails_nothing(measured_ratios, capsys):
    before = {"monitor_loop": 1.02, "functional": 0.7, "functional bound": 0.6}
    measured_ratios += [before, before | {"functional bound": 0.9}]
    assert check.main(["--workloads", "mlp", "--store"]) == 0
    assert re.search(r"empirical_fisher_trace +0\.70 .* bound 0\.60 +goal 0\.64 missed", capsys.readouterr().out)
    assert check.main(["--workloads", "mlp"]) == 0
    assert "bound 0.90" in capsys.readouterr().out


def test_the_check_measures_bounds_with_what_they_bound(monkeypatch):
    measured = []

    def rows(workload, variants, *args, **options):
        measured.extend(variants)
        return {name: {"of fastest": float(number)} for number, name in enumerate(variants)}

    monkeypatch.setattr(speed, "measured", rows)
    found = check.times(WORKLOADS["mlp"], ("monitor", "functional"), 1, None)
    assert measured == ["monitor", "functional", "function_bound"]
    assert found == {"monitor": 0.0, "functional": 1.0, "functional bound": 2.0}


def test_without_stored_ratios_there_is_nothing_to_check(measured_ratios, capsys):
    assert check.main(["--workloads", "mlp"]) == 2
    assert "by --store" in capsys.readouterr().out
