"""fisher_report: the loop that the library runs itself."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import tqdm.auto
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from model_state import assert_unchanged, state
from oracles import assert_equal, exact_fisher, per_sample_squared_norms, total, trace
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report, fisher_results, hessian_trace
from torch_secorder.errors import ArgumentError, CurvatureError, LifecycleError
from torch_secorder.pruning import Gates

Batch = tuple[Tensor, Tensor]


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batches() -> list[Batch]:
    return [(torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))) for n in (5, 3)]


def pooled(data: list[Batch]) -> Batch:
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    return x, y


def assert_report(report: pd.DataFrame, squared: dict[str, Tensor], reduction: str = "mean") -> None:
    expected = trace(squared, reduction)
    assert list(report.index) == list(expected)
    for name, value in expected.items():
        assert_equal(torch.tensor(report.loc[name, "fisher_trace"]), value, total(expected), torch.float64)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empirical_is_what_a_monitor_sees(reduction: str) -> None:
    model, data, loss_fn = classifier(), batches(), nn.CrossEntropyLoss(reduction=reduction)
    report = fisher_report(model, loss_fn, data, progress=False)
    assert_report(report, per_sample_squared_norms(model, loss_fn, *pooled(data)), reduction)
    with FisherMonitor(model, reduction=reduction) as monitor:
        for x, y in data:
            loss_fn(model(x), y).backward()
    theirs = monitor.report()
    exact = ["module", "module_type", "shape", "numel", "fisher_trace", "fisher_trace_stderr", "fisher_trace_share"]
    pd.testing.assert_frame_equal(report[exact], theirs[exact], rtol=1e-10)
    assert list(report.columns) == list(theirs.columns)
    assert report.attrs["reduction"] == reduction
    assert report.attrs["fisher"] == "empirical"
    assert report.attrs["n_samples"] == 8
    assert report.attrs["n_passes"] == 2


def shuffled(batches: int, size: int) -> list[Batch]:
    return [(torch.randn(size, 4, dtype=torch.float64), torch.randint(3, (size,))) for _ in range(batches)]


def relative_errors(squared: dict[str, Tensor]) -> dict[str, float]:
    """The standard errors of a table's rows and of their total, from every sample's squared norms."""
    rows = {name: float(t.std() / len(t) ** 0.5 / t.mean()) for name, t in squared.items()}
    whole = torch.stack(list(squared.values())).sum(0)
    return rows | {"total": float(whole.std() / len(whole) ** 0.5 / whole.mean())}


@pytest.mark.parametrize("rtol_of", ["total", "rows"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_it_stops_at_the_first_batch_that_is_precise_enough(rtol_of: str, reduction: str) -> None:
    model, data, loss_fn = classifier(), shuffled(60, 8), nn.CrossEntropyLoss(reduction=reduction)
    report = fisher_report(model, loss_fn, data, rtol=0.07, rtol_of=rtol_of, progress=False)
    stopped = report.attrs["n_passes"]
    assert 4 <= stopped < 60
    found = []
    for passes in (stopped - 1, stopped):
        x, y = pooled(data[:passes])
        errors = relative_errors(per_sample_squared_norms(model, nn.CrossEntropyLoss(reduction="sum"), x, y))
        found.append(errors["total"] if rtol_of == "total" else max(errors[name] for name in report.index))
    before, after = found
    assert after <= 0.07 < before or (after <= 0.07 and stopped == 4)
    facts = {name: report.attrs[name] for name in ("rtol", "rtol_of", "reached_rtol")}
    assert facts == {"rtol": 0.07, "rtol_of": rtol_of, "reached_rtol": True}
    assert report.attrs["relative_stderr"] == pytest.approx(after, rel=1e-6)
    assert_report(report, per_sample_squared_norms(model, loss_fn, *pooled(data[:stopped])), reduction)


def test_it_says_that_the_data_ended_before() -> None:
    model, data = classifier(), shuffled(3, 8)
    report = fisher_report(model, cross_entropy, data, rtol=1e-6, progress=False)
    assert (report.attrs["n_samples"], report.attrs["reached_rtol"]) == (24, False)
    errors = relative_errors(per_sample_squared_norms(model, cross_entropy, *pooled(data)))
    assert report.attrs["relative_stderr"] == pytest.approx(errors["total"], rel=1e-6)
    assert "rtol" not in fisher_report(model, cross_entropy, data, progress=False).attrs
    # Thirty-two samples are the least, however equal they are.
    same = [(data[0][0][:1].expand(8, -1), torch.zeros(8, dtype=torch.long))] * 10
    assert fisher_report(model, cross_entropy, same, rtol=0.5, progress=False).attrs["n_samples"] == 32
    few = fisher_results(model, cross_entropy, same[:3], rtol=0.5, progress=False)
    facts = few.report().attrs
    assert facts["relative_stderr"] < 1e-6
    assert (facts["n_samples"], facts["reached_rtol"]) == (24, False)
    assert (
        "the data ended at a standard error of 0.0% of the total, 50.0% asked for (which so few samples do not tell)"
        in (few.summary())
    )


def test_rows_that_are_zero_but_for_rounding_do_not_keep_it_running() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.shift = nn.Linear(4, 3), nn.Parameter(torch.zeros(1))
            self.unused = nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.shift  # softmax doesn't see it

    report = fisher_report(
        *(Shifted().double(), cross_entropy, shuffled(100, 8)), rtol=0.1, rtol_of="rows", progress=False
    )
    assert report.attrs["reached_rtol"]
    assert report.attrs["n_passes"] < 100


def test_merged_results_say_nothing_of_a_precision() -> None:
    model, data = classifier(), shuffled(10, 8)
    one, two = (fisher_results(model, cross_entropy, data, rtol=0.5, progress=False) for _ in range(2))
    assert one.report().attrs["rtol"] == 0.5
    assert one.report("module").attrs["reached_rtol"]
    assert "rtol" not in one.merge(two).report().attrs


def test_the_progress_bar_says_how_precise_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fisher_report(classifier(), cross_entropy, shuffled(30, 8), rtol=0.08)
    assert re.search(r"stderr \d+\.\d% of the total, stops at 8\.0%", capsys.readouterr().err)
    fisher_report(classifier(), cross_entropy, shuffled(3, 8))
    assert "stderr" not in capsys.readouterr().err


@pytest.mark.parametrize("rtol", [0, -0.1, True, "5%", float("nan"), float("inf")])
def test_a_precision_that_means_nothing(rtol: Any) -> None:
    with pytest.raises(ArgumentError, match="rtol must be a positive number"):
        fisher_report(classifier(), cross_entropy, shuffled(1, 8), rtol=rtol, progress=False)
    with pytest.raises(ArgumentError, match="rtol_of must be one of"):
        fisher_report(classifier(), cross_entropy, shuffled(1, 8), rtol_of="mean", progress=False)


def test_whose_precision_without_a_precision() -> None:
    with pytest.raises(ArgumentError, match="rtol_of='rows' says whose error ends the run: pass rtol="):
        fisher_report(classifier(), cross_entropy, shuffled(1, 8), rtol_of="rows", progress=False)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.first, x, use_reentrant=False).tanh())


@pytest.mark.parametrize("model", [classifier(), Checkpointed().double()], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(
    "analysis",
    [
        lambda model, x, y: fisher_report(model, cross_entropy, (x, y), progress=False),
        lambda model, x, y: fisher_report(model, None, (x, y), fisher="exact", progress=False),
        lambda model, x, y: empirical_fisher_trace(model, cross_entropy, x, y, create_graph=True),
        lambda model, x, y: hessian_trace(model, cross_entropy, x, y, 2),
    ],
    ids=["empirical", "exact", "differentiable", "hessian"],
)
def test_monitors_around_it_see_only_what_the_user_runs(analysis: Callable[..., object], model: nn.Module) -> None:
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
    expected = per_sample_squared_norms(model, cross_entropy, x, y)
    with FisherMonitor(model) as monitor, FisherMonitor(model.last if hasattr(model, "last") else model[2]) as inner:
        with Gates(model, modules=(nn.Linear,)) as gates:
            analysis(model, x, y)
            loss = cross_entropy(model(x), y)
            analysis(model, x, y)
            loss.backward()
        analysis(model, x, y)
    assert_report(monitor.report(), expected)
    assert (monitor.n_samples, inner.n_samples, gates.n_samples) == (8, 8, 8)


def test_grad_sq_norm_is_that_of_the_batches_or_not_there() -> None:
    """No .grad is written; a parameter gradient that was not computed has no norm."""
    model, data, loss_fn = classifier(), batches(), nn.CrossEntropyLoss()
    report = fisher_report(model, loss_fn, data, progress=False)
    with FisherMonitor(model) as monitor:
        for x, y in data:
            loss_fn(model(x), y).backward()
    theirs = monitor.report()["grad_sq_norm"]
    mine = report["grad_sq_norm"]
    assert ((mine.isna()) | ((mine - theirs).abs() <= 1e-8 * theirs)).all()


def test_one_pair_is_one_batch() -> None:
    model, (x, y) = classifier(), batches()[0]
    report = fisher_report(model, nn.CrossEntropyLoss(), (x, y), progress=False)
    assert_report(report, per_sample_squared_norms(model, nn.CrossEntropyLoss(), x, y))
    assert report.attrs["n_samples"] == 5


def test_a_list_of_two_batches_is_not_one_pair() -> None:
    model, data = classifier(), batches()
    assert fisher_report(model, nn.CrossEntropyLoss(), [*data], progress=False).attrs["n_samples"] == 8


def test_batches_that_are_lists_as_a_data_loader_gives_them() -> None:
    model, (x, y) = classifier(), pooled(batches())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=3)
    assert_report(
        fisher_report(model, nn.CrossEntropyLoss(), loader, progress=False),
        per_sample_squared_norms(model, nn.CrossEntropyLoss(), x, y),
    )


def test_generators_are_read_once_and_no_further_than_max_batches() -> None:
    model, data, drawn = classifier(), batches(), []

    def stream() -> Iterator[Batch]:
        for pair in (*data, *data):
            drawn.append(pair)
            yield pair

    report = fisher_report(model, nn.CrossEntropyLoss(), stream(), max_batches=2, progress=False)
    assert_report(report, per_sample_squared_norms(model, nn.CrossEntropyLoss(), *pooled(data)))
    assert len(drawn) <= 3


@pytest.mark.parametrize("kind", ["tuple", "mapping"])
def test_inputs_by_position_and_by_name(kind: str) -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 3), nn.Linear(2, 3)

        def forward(self, x: Tensor, extra: Tensor) -> Tensor:
            return self.one(x).tanh() + self.two(extra)

    model = TwoInputs().double()
    x, y = batches()[0]
    extra = torch.randn(5, 2, dtype=torch.float64)
    inputs: Any = (x, extra) if kind == "tuple" else {"extra": extra, "x": x}
    expected = per_sample_squared_norms(model, nn.CrossEntropyLoss(), inputs, y)
    assert_report(fisher_report(model, nn.CrossEntropyLoss(), (inputs, y), progress=False), expected)
    assert_report(fisher_report(model, nn.CrossEntropyLoss(), [(inputs, y)], progress=False), expected)


class EveryStep(tqdm.auto.tqdm):
    """A bar that draws every step, also those that take no time."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, mininterval=0, miniters=1, **options)


@pytest.mark.parametrize("classes", [3, 12, 102])
@pytest.mark.parametrize("installed", [True, False])
def test_progress_shows_passes_and_the_total_and_says_once_what_sampling_costs(
    classes: int, installed: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if installed:
        monkeypatch.setattr("tqdm.auto.tqdm", EveryStep)
    else:
        monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    model, data = nn.Linear(4, classes), [(torch.randn(5, 4), None) for _ in range(3)]
    fisher_report(model, None, data, fisher="exact", progress=True)
    shown = capsys.readouterr().err
    assert (f"{classes - 1}/{classes - 1} " in shown) == (installed and classes > 10)
    cost = f'takes {classes - 1} backward passes for each batch here; fisher="sampled" takes num_samples'
    assert shown.count(cost) == (classes > 100)
    two = fisher_report(model, None, data[:2], fisher="exact", progress=False)
    assert (f"trace {two['fisher_trace'].sum():.4g} ± {two.attrs['total_stderr']:.2g}" in shown) == installed
    fisher_report(model, None, data, fisher="sampled", num_samples=101, progress=True)
    assert "backward passes for each" not in capsys.readouterr().err


def test_a_bar_counts_the_batches_that_its_total_is_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    model, data = nn.Linear(4, 3), [(torch.randn(5, 4), None) for _ in range(3)]
    fisher_report(model, None, data, fisher="exact", progress=True)
    shown = capsys.readouterr().err
    for count in (1, 2, 3):
        trace = fisher_report(model, None, data[:count], fisher="exact", progress=False)["fisher_trace"].sum()
        lines = [line for line in shown.split("\r") if f"trace {trace:.4g} ±" in line]
        assert lines
        assert all(f" {count}/3 " in line for line in lines), lines


def test_no_bar_is_drawn_into_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    fisher_report(nn.Linear(4, 3), None, (torch.randn(5, 4), None), fisher="exact", progress=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_no_part_of_the_answer(progress: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = classifier(), batches()
    report = fisher_report(model, nn.CrossEntropyLoss(), data, progress=progress)
    assert_report(report, per_sample_squared_norms(model, nn.CrossEntropyLoss(), *pooled(data)))
    out, err = capsys.readouterr()
    assert out == ""
    assert progress or err == ""


def test_exact_fisher() -> None:
    model, data = classifier(), batches()
    report = fisher_report(model, None, data, fisher="exact", progress=False)
    assert_report(report, exact_fisher(model, *pooled(data)))
    assert report.attrs["fisher"] == "exact"
    assert report.attrs["n_samples"] == 8


@pytest.mark.parametrize("loss_type", ["nll", "mse", "bce", "poisson"])
def test_exact_fisher_of_every_likelihood(loss_type: str) -> None:
    model, (x, y) = classifier(), pooled(batches())
    report = fisher_report(model, None, (x, y), fisher="exact", loss_type=loss_type, progress=False)
    assert_report(report, exact_fisher(model, x, loss_type=loss_type))


def test_observed_labels_give_the_empirical_fisher_of_the_likelihood() -> None:
    model, data = classifier(), batches()
    report = fisher_report(model, None, data, fisher="observed", progress=False)
    assert_report(report, per_sample_squared_norms(model, nn.CrossEntropyLoss(), *pooled(data)))
    assert report.attrs["fisher"] == "observed"


@pytest.mark.slow
def test_sampled_fisher_is_unbiased() -> None:
    torch.manual_seed(0)
    model, (x, y) = classifier(), batches()[0]
    draws = torch.tensor(
        [fisher_report(model, None, (x, y), fisher="sampled", progress=False)["fisher_trace"].sum() for _ in range(200)]
    )
    expected = float(total(trace(exact_fisher(model, x))))
    assert abs(float(draws.mean()) - expected) < 5 * float(draws.std()) / len(draws) ** 0.5
    assert float(draws.std()) > 0
    report = fisher_report(model, None, (x, y), fisher="sampled", num_samples=2000, progress=False)
    assert report["fisher_trace"].sum() == pytest.approx(expected, rel=0.2)
    assert report.attrs["fisher"] == "sampled"
    assert report.attrs["n_samples"] == 5


@pytest.mark.parametrize("fisher", ["empirical", "exact", "sampled", "observed"])
def test_the_model_is_left_as_it_was(fisher: str) -> None:
    model, data = classifier(), batches()
    model[0].requires_grad_(False)
    model[2].weight.grad = torch.ones_like(model[2].weight)
    before = state(model)
    fisher_report(model, nn.CrossEntropyLoss(), data, fisher=fisher, progress=False)
    assert_unchanged(before, model)


def test_the_model_is_left_as_it_was_after_an_error() -> None:
    model, data = classifier(), batches()
    data[1] = (data[1][0] * torch.nan, data[1][1])
    before = state(model)
    with pytest.raises(CurvatureError, match=r"0\.weight"):
        fisher_report(model, nn.CrossEntropyLoss(), data, progress=False)
    assert_unchanged(before, model)


def test_frozen_parameters_on_request() -> None:
    model, data = classifier(), batches()
    model.requires_grad_(False)
    report = fisher_report(model, nn.CrossEntropyLoss(), data, parameters="all", progress=False)
    assert_report(report, per_sample_squared_norms(model, nn.CrossEntropyLoss(), *pooled(data), parameters="all"))
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fisher": "true"}, r"fisher.*empirical"),
        ({"loss_fn": None}, r"loss_fn"),
        ({"data": []}, r"(?i)no batch|empty|no sample|data"),
        ({"fisher": "sampled", "num_samples": 0}, r"num_samples"),
        ({"fisher": "sampled", "num_samples": True}, r"num_samples"),
        ({"fisher": "exact", "loss_type": "hinge"}, r"loss_type.*hinge|hinge"),
        ({"max_batches": 0}, r"max_batches"),
        ({"loss_fn": list(range(100))}, r"^loss_fn must be a module or a function.{,220}$"),
        ({"data": TensorDataset(torch.randn(5, 4))}, r"not a TensorDataset.*DataLoader"),
        ({"data": [{"inputs": torch.randn(5, 4), "labels": None}]}, r"takes no 'inputs', 'labels'.*batch\['labels'\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    call = {"model": classifier(), "loss_fn": nn.CrossEntropyLoss(), "data": batches(), "progress": False, **arguments}
    before = state(call["model"])
    with pytest.raises(CurvatureError, match=message):
        fisher_report(**call)
    assert_unchanged(before, call["model"])


def test_data_that_are_not_pairs() -> None:
    with pytest.raises(CurvatureError, match=r"inputs, targets"):
        fisher_report(classifier(), nn.CrossEntropyLoss(), [torch.randn(5, 4, dtype=torch.float64)], progress=False)


def test_a_model_without_numbers() -> None:
    for analysis in (
        FisherMonitor,
        lambda model: fisher_report(model, nn.CrossEntropyLoss(), batches(), progress=False),
    ):
        with pytest.raises(CurvatureError, match=r"weight, bias.*meta device.*load"):
            analysis(nn.Linear(4, 3, device="meta"))


def test_inference_mode_and_unknown_options() -> None:
    with torch.inference_mode(), pytest.raises(ArgumentError, match="inference_mode"):
        fisher_report(classifier(), nn.CrossEntropyLoss(), batches(), progress=False)
    with pytest.raises(TypeError, match=r"fisher_results: .*'by'"):
        fisher_results(classifier(), nn.CrossEntropyLoss(), batches(), by="module")


def test_the_diagonal_and_the_activations_of_every_fisher_are_those_of_a_loop() -> None:
    """The expectation over labels is written out, one sample and one label at a time."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4)).double()
    x, y = torch.randn(5, 1, 6, 6, dtype=torch.float64), torch.randint(4, (5,))
    weights = {"exact": model(x).softmax(1).detach(), "observed": torch.eye(4, dtype=torch.float64)[y]}
    weights["empirical"] = weights["observed"]
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    for fisher, weight in weights.items():
        results = fisher_results(
            model, nn.CrossEntropyLoss(), batches, fisher=fisher, diagonal=True, activations=True, progress=False
        )
        diagonal = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        outputs = {"0": 0.0, "3": 0.0}
        for n in range(5):
            for label in range(4):
                hidden = model[0](x[n : n + 1])
                logits = model[1:](hidden)
                loss = nn.functional.cross_entropy(logits, torch.tensor([label]))
                *grads, in_hidden, in_logits = torch.autograd.grad(loss, [*model.parameters(), hidden, logits])
                for sum_, grad in zip(diagonal.values(), grads, strict=True):
                    sum_ += weight[n, label] * grad.square() / 5
                for name, grad in (("0", in_hidden), ("3", in_logits)):
                    outputs[name] += float(weight[n, label] * grad.square().sum() / 5)
        for name, sum_ in diagonal.items():
            torch.testing.assert_close(results.diagonal[name], sum_)
        for name, sum_ in outputs.items():
            assert results.activations.loc[name, "activation_trace"] == pytest.approx(sum_, rel=1e-8)
        assert results.activations.loc["0", "numel"] == 5 * 48
        assert results.activations.attrs.items() <= results.report().attrs.items()
        assert results.report().attrs["fisher"] == fisher
        assert results.report()["fisher_trace"].sum() == pytest.approx(sum(float(d.sum()) for d in diagonal.values()))
        assert all(p.grad is None for p in model.parameters())


class SequenceFirst(nn.Module):
    """A position embedding that is turned before it meets the data."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.first, self.last = nn.Parameter(torch.randn(4, 6)), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x.transpose(0, 1)) + self.positions[:, None]).mean(0))


def test_the_diagonal_of_a_parameter_in_another_layout_behind_the_first_layer() -> None:
    """Unlike its norm it takes calls of nodes, which have to wait for the end of the backward pass."""
    model = SequenceFirst().double()
    x, y = torch.randn(5, 4, 6, dtype=torch.float64), torch.randint(3, (5,))
    results = fisher_results(model, nn.CrossEntropyLoss(), (x, y), diagonal=True, progress=False)
    for name, parameter in model.named_parameters():
        losses = (nn.functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1]) for n in range(5))
        squares = [torch.autograd.grad(loss, parameter)[0].square() for loss in losses]
        torch.testing.assert_close(results.diagonal[name], torch.stack(squares).mean(0))


def test_results_keep_what_was_asked_for(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    data = (torch.randn(6, 3), None)
    bare = fisher_results(model, None, data, fisher="exact", progress=False)
    for what in ("diagonal", "activations", "per_sample"):
        with pytest.raises(LifecycleError, match=f"{what}=True"):
            getattr(bare, what)
    full = fisher_results(model, None, data, fisher="exact", per_sample=True, progress=False)
    assert full.per_sample["weight"].mean() == pytest.approx(full.report().loc["weight", "fisher_trace"])
    full.save(tmp_path / "full.safetensors")
    again = FisherMonitor.load(tmp_path / "full.safetensors")
    pd.testing.assert_frame_equal(again.report(), full.report())
    assert again.report().attrs["fisher"] == "exact"
    with pytest.raises(ArgumentError, match="cannot merge fisher='empirical' into fisher='exact'"):
        again.merge(fisher_results(model, nn.MSELoss(), (data[0], torch.randn(6, 2)), per_sample=True, progress=False))
    with pytest.raises(ArgumentError, match="no batch"):
        fisher_results(model, None, [], fisher="exact", progress=False)
