"""The fuzzer itself: that its seeds come to what they should, that it finds what is wrong, and that its programs run."""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import torch_secorder
from fuzz import __main__ as command
from fuzz import truth, ways
from fuzz.case import Case, Step, drawn
from fuzz.model import Site
from fuzz.outcomes import Outcome, outcome, shrunk
from fuzz.program import program
from fuzz.registry import LOSSES, PIECES, WAYS

OPTIONS = {
    "diagonal": True,
    "per_sample": True,
    "activations": False,
    "parameters": "trainable",
    "loss_scale": 0.5,
    "max_memory": None,
}


def case_of(*pieces: str, **changes: object) -> Case:
    """A small case of these pieces by all ways."""
    steps = tuple(Step(piece, i, around=bool(i % 2)) for i, piece in enumerate(pieces))
    case = Case(3, 4, 3, "projected", steps, "mean_of_places", "mean_of_samples", tuple(WAYS), (5, 3), options=OPTIONS)
    return replace(case, **changes)  # type: ignore[arg-type]


EXACT = [
    ["linear", "layer_norm", "prelu"],
    ["conv1d", "group_norm", "perceptron"],
    ["embedding", "tied", "positions"],
    ["sequence_first", "folded_time_outside", "windows"],
    ["multihead_attention", "encoder_layer"],
    ["recurrent", "cell", "packed"],
    ["checkpointed", "in_place", "functional_norm"],
    ["parametrized", "pruned", "einsum"],
    ["routed_samples", "experts_by_weight", "glu"],
]


@pytest.mark.slow
@pytest.mark.parametrize("pieces", EXACT, ids=" ".join)
def test_separate_samples_are_exact(pieces: list[str]) -> None:
    assert outcome(case_of(*pieces)) == Outcome("exact")


@pytest.mark.parametrize("piece", [name for name, entry in PIECES.items() if entry.coupled])
def test_pieces_that_mix_samples_are_refused(piece: str) -> None:
    for name in ("monitor", "empirical"):
        assert outcome(case_of("linear", piece, sizes=(5,), ways=(name,))).kind in ("coupled", "exact"), name
    assert outcome(case_of("linear", piece, sizes=(5,), ways=("report",))).kind == "coupled"


@pytest.mark.parametrize(
    ("way", "kind"), [("monitor", "hidden"), ("exact", "hidden"), ("report", "exact"), ("empirical", "exact")]
)
def test_a_reentrant_checkpoint_is_hidden_in_the_users_own_run_only(
    way: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Site, "choice", lambda self, *options: options[0])
    case = replace(case_of(ways=(way,), sizes=(4,)), steps=(Step("checkpointed", 0, around=False),))
    assert outcome(case).kind == kind


COMPARING = [
    "square_of_the_batch_mean",
    "contrastive",
    "same_class_is_near",
]


@pytest.mark.parametrize("loss", COMPARING)
def test_losses_that_mix_samples_are_refused(loss: str) -> None:
    assert outcome(case_of("linear", loss=loss, sizes=(5,), ways=("report",))).kind == "coupled"


@pytest.mark.parametrize("dtype", ["float32", "autocast"])
def test_other_precisions_are_right(dtype: str) -> None:
    assert outcome(case_of("linear", "layer_norm", dtype=dtype, ways=("monitor", "report"))) == Outcome("exact")


@pytest.mark.parametrize("loss", [name for name, entry in LOSSES.items() if not entry.coupled])
def test_shares_of_losses_add_up(loss: str) -> None:
    tokens = LOSSES[loss].needs == "tokens"
    case = case_of(
        "linear", loss=loss, head="every_place" if tokens else "mean_of_places", data="first sample is padding"
    )
    for x, y in case.batches():
        value, shares = LOSSES[loss].make(case.model()(x), y)
        torch.testing.assert_close(value, shares.sum() if case.reduction == "sum" else shares.mean())


def test_a_case_is_the_same_each_time() -> None:
    assert drawn(17) == drawn(17)
    one, other = drawn(17).model(), drawn(17).model()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert all(torch.equal(x, z) for (x, _), (z, _) in zip(drawn(17).batches(), drawn(17).batches(), strict=True))


class Doubled(torch_secorder.FisherMonitor):
    """A monitor with a fault: the total is right, and the numbers of single parameters are not."""

    def report(self, by: object = None, **options: object) -> object:
        return 2 * super().report()[["fisher_trace"]]


@pytest.mark.slow
def test_what_is_wrong_is_found_and_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "FisherMonitor", Doubled)
    case, found = shrunk(case_of("linear", "layer_norm"))
    assert (found.kind, found.way, case.steps, case.ways) == ("wrong", "monitor", (), ("monitor",))
    assert len(case.sizes) == 1
    assert "monitor, fisher_trace" in found.detail


def test_nan_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "empirical_fisher_trace", lambda *args: torch.tensor(float("nan")))
    assert outcome(case_of("linear", ways=("empirical",))).kind == "wrong"


@pytest.mark.parametrize(("rounding", "kind"), [(2.0**-52, "wrong"), (1e-6, "rounded")])
def test_what_plain_autograd_does_not_know_itself_is_not_wrong(
    rounding: float, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number is off by a millionth; if the inputs were known to a millionth only, nobody could say that it is wrong."""
    trace = ways.empirical_fisher_trace
    monkeypatch.setattr(ways, "empirical_fisher_trace", lambda *args: trace(*args) * (1 + 1e-6))
    monkeypatch.setitem(truth.ROUNDING, "float64", rounding)
    assert outcome(case_of("linear", ways=("empirical",))).kind == kind


def test_foreign_exceptions_are_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise IndexError("dimension")

    monkeypatch.setattr(ways, "empirical_fisher_trace", fails)
    assert outcome(case_of("linear", ways=("empirical",))).kind == "crashed"


@pytest.mark.parametrize(
    "kind", ["exact", "coupled", "frozen", "hidden", "refused", "wrong", "crashed", "inconsistent", "rounded"]
)
def test_the_command_fails_for_wrong_numbers_and_crashes_only(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 0.0, 2.0])
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(command, "outcome", lambda case: Outcome(kind, "report", "why"))
    monkeypatch.setattr(command, "shrunk", lambda case: (case, Outcome(kind, "report", "why")))
    monkeypatch.setattr(sys, "argv", ["fuzz", "--seconds", "1"])
    assert command.main() == (kind in ("wrong", "crashed", "inconsistent"))
    assert f"{kind:13}       1 100.00%" in capsys.readouterr().out


def test_an_interrupted_run_says_what_it_has_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also in the middle of a case, and it fails if something has failed before."""
    outcomes = iter([Outcome("exact"), Outcome("refused", detail="why not"), Outcome("inconsistent")])

    def next_outcome(case: Case) -> Outcome:
        if (found := next(outcomes, None)) is None:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(command, "outcome", next_outcome)
    monkeypatch.setattr(command, "shrunk", lambda case: (case, Outcome("inconsistent")))
    monkeypatch.setattr(sys, "argv", ["fuzz", "--seconds", "600", "--seed", "4"])
    assert command.main() == 1
    printed = capsys.readouterr().out
    assert "interrupted at --case 40000003" in printed
    assert "1 refused: why not (first: --case 40000001)" in printed
    assert "exact               1  33.33%" in printed


@pytest.mark.slow
def test_a_program_of_a_case_runs_by_itself(tmp_path: Path) -> None:
    case = case_of("sort_by_index", "embedding", "parametrized", sizes=(4,))
    assert outcome(case) == Outcome("exact")
    (tmp_path / "case.py").write_text(program(case))
    runpy.run_path(str(tmp_path / "case.py"), run_name="case")
    nan = "empirical_fisher_trace = lambda *args: torch.tensor(float('nan'))\nfor run in ("
    (tmp_path / "wrong.py").write_text(program(case).replace("for run in (", nan))
    with pytest.raises(AssertionError, match=r"empirical_fisher_trace: got \[nan\]"):
        runpy.run_path(str(tmp_path / "wrong.py"), run_name="wrong")
