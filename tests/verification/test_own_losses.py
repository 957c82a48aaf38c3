"""Losses that a model computes itself: those that compare samples are refused for any numbers, and averages never are."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tagger import IGNORED, Tagger, tagged
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report
from torch_secorder.errors import ArgumentError, VerificationError
from torch_secorder.model.parameters import ParameterTable
from torch_secorder.verification.differentiable_model import DifferentiableModel

# From the samples' losses to the batch's.
Combined = Callable[[Tensor], Tensor]


def others_mean(losses: Tensor) -> Tensor:
    """For each sample the mean of the others' losses."""
    return (losses.sum() - losses) / max(len(losses) - 1, 1)


COMPARING: dict[str, Combined] = {
    "root of the mean": lambda x: x.mean().sqrt(),
    "logarithm of the mean": lambda x: x.mean().log(),
    "square of the mean": lambda x: x.mean() ** 2,
    "exponential of the mean": lambda x: x.mean().exp(),
    "root of the mean square": lambda x: x.square().mean().sqrt(),
    "mean of logarithms": lambda x: x.log().mean().exp(),
    "harmonic mean": lambda x: 1 / (1 / x).mean(),
    "soft maximum": lambda x: x.logsumexp(0) - math.log(len(x)),
    "mean and deviation": lambda x: x.mean() + 0.1 * x.std(unbiased=False),
    "largest": lambda x: x.max(),
    "smallest": lambda x: x.min(),
    "median": lambda x: x.median(),
    "larger half": lambda x: x.topk(-(-len(x) // 2)).values.mean(),
    "ranks": lambda x: (x.sort().values * torch.arange(1, len(x) + 1).to(x)).mean() * 2 / (len(x) + 1),
    "value of one loss and gradient of another": lambda x: x.mean() + x.mean().sqrt() - x.mean().sqrt().detach(),
}
# A factor that is detached is in no graph: it shows where the other samples' numbers change.
WITH_DETACHED_FACTORS: dict[str, Combined] = {
    "times the mean": lambda x: x.mean() * x.mean().detach(),
    "over the mean": lambda x: x.mean() / x.mean().detach(),
    "over the largest": lambda x: x.mean() / x.max().detach(),
    "times the others' mean": lambda x: (x * others_mean(x).detach()).mean(),
    "weights made of losses": lambda x: (x * x.detach().softmax(0)).sum(),
}
# The gradient of these is that of an average, or of a sum, until two samples change their order.
RANKING: dict[str, Combined] = {
    "distance of two": lambda x: x.mean() + 0.1 * (x[:1] - x[-1:]).norm(),
    "distances": lambda x: x.mean() + 0.1 * torch.cdist(x[:, None], x[:, None]).mean(),
    "larger of two": lambda x: x.mean() + 0.1 * torch.where(x[0] > x[-1], x[0] - x[-1], x[-1] - x[0]),
    "detached ranks": lambda x: (x * (1 + 0.1 * (x.detach().argsort().argsort() - (len(x) - 1) / 2))).mean(),
    "detached threshold": lambda x: weighted(x, x.detach() >= x.detach().mean()),
}
# These are refused before a sample runs alone: two equal samples have neither the loss of one nor twice that.
NO_REDUCTION: dict[str, Combined] = {
    "logarithm of a sum": lambda x: x.logsumexp(0),
    "norm": lambda x: x.norm(),
    "square of the sum": lambda x: x.sum() ** 2,
}


class Classifier(nn.Module):
    """A small network that combines its samples' losses itself."""

    def __init__(self, combined: Combined):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.combined = combined

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": self.combined(cross_entropy(logits, labels, reduction="none")), "logits": logits}


def problem(seed: int, combined: Combined, dtype: torch.dtype, n: int = 6) -> tuple[Classifier, dict[str, Tensor]]:
    torch.manual_seed(seed)
    return Classifier(combined).to(dtype), {"x": torch.randn(n, 4, dtype=dtype), "labels": torch.randint(3, (n,))}


def refused(run: Callable[[], object]) -> bool:
    """Whether it is refused by what looks at how samples are combined."""
    try:
        run()
    except (VerificationError, ArgumentError) as error:
        assert re.search("compares samples|squared gradient norms differ", str(error))
        return True
    return False


def passing(run: Callable[[int], object], seeds: Iterable[int]) -> list[int]:
    """The seeds for which nothing is refused: a refusal by the luck of the numbers is none."""
    return [seed for seed in seeds if not refused(partial(run, seed))]


@pytest.mark.parametrize("name", [*COMPARING, *WITH_DETACHED_FACTORS])
def test_trap_07_the_models_own_loss_that_compares_samples_is_refused(name: str) -> None:
    combined = (COMPARING | WITH_DETACHED_FACTORS)[name]

    def run(seed: int) -> None:
        model, batch = problem(seed, combined, torch.float64 if seed % 2 else torch.float32)
        empirical_fisher_trace(model, "model", batch, None)

    assert passing(run, range(8)) == []


@pytest.mark.parametrize("name", [*COMPARING, *WITH_DETACHED_FACTORS])
def test_trap_07_the_same_loss_as_a_function_is_refused(name: str) -> None:
    combined = (COMPARING | WITH_DETACHED_FACTORS)[name]

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return combined(cross_entropy(outputs, targets, reduction="none"))

    def run(seed: int) -> None:
        model, batch = problem(seed, combined, torch.float64 if seed % 2 else torch.float32)
        if seed % 3:
            empirical_fisher_trace(model.net, loss_fn, batch["x"], batch["labels"])
        else:
            fisher_report(model.net, loss_fn, (batch["x"], batch["labels"]), progress=False)

    assert passing(run, range(6)) == []  # each dtype with both of them


@pytest.mark.parametrize("own", [True, False], ids=["the model's", "the user's"])
@pytest.mark.parametrize("name", RANKING)
@pytest.mark.parametrize("n", [2, 6])
def test_trap_23_samples_that_only_rank_each_other_are_seen(n: int, name: str, own: bool) -> None:
    combined = RANKING[name]

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return combined(cross_entropy(outputs, targets, reduction="none"))

    def run(seed: int) -> None:
        model, batch = problem(seed, combined, torch.float64, n)
        if own:
            empirical_fisher_trace(model, "model", batch, None)
        else:
            empirical_fisher_trace(model.net, loss_fn, batch["x"], batch["labels"])

    assert passing(run, range(4)) == []


@pytest.mark.parametrize("own", [True, False], ids=["the model's", "the user's"])
@pytest.mark.parametrize("name", COMPARING)
def test_trap_07_a_monitor_that_is_asked_refuses_what_the_graph_shows(name: str, own: bool) -> None:
    combined = COMPARING[name]

    def run(seed: int) -> None:
        model, batch = problem(seed, combined, torch.float64)
        with FisherMonitor(model if own else model.net) as monitor:
            outputs = model(**batch) if own else {"logits": model.net(batch["x"])}
            each = cross_entropy(outputs["logits"], batch["labels"], reduction="none")
            monitor.verify(outputs["loss"] if own else combined(each))

    assert passing(run, range(6)) == []


@pytest.mark.parametrize("name", NO_REDUCTION)
@pytest.mark.parametrize("seed", range(5))
def test_own_losses_that_neither_average_nor_sum(name: str, seed: int) -> None:
    model, batch = problem(seed, NO_REDUCTION[name], torch.float64)
    with pytest.raises(ArgumentError, match="neither averages nor sums"):
        fisher_report(model, "model", batch, progress=False)


@pytest.mark.parametrize("loss", ["root", "contrast"])
def test_trap_07_a_token_loss_that_compares_samples_is_refused(loss: str) -> None:
    """Before training all tokens have nearly the same loss, so that a root of their mean is nearly their mean."""

    def run(seed: int) -> None:
        torch.manual_seed(seed)
        fisher_report(Tagger(loss).double(), "model", tagged(), progress=False)

    assert passing(run, range(8)) == []


@pytest.mark.parametrize("pair", [(0, 2), (1, 3), (3, 4), (2, 5)], ids=str)
def test_trap_07_one_pair_of_samples_that_the_models_loss_compares_is_seen(pair: tuple[int, int]) -> None:
    """Also where none of the two is run alone, and a smaller batch has no such pair."""

    def combined(losses: Tensor) -> Tensor:
        return losses.mean() + (losses[pair[0]] * losses[pair[1]] if len(losses) == 6 else 0.0) / 100

    def run(seed: int) -> None:
        model, batch = problem(seed, combined, torch.float64)
        empirical_fisher_trace(model, "model", batch, None)

    assert passing(run, range(8)) == []


# ------------------------------------------------------------------------------------------------ averages and sums

WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.5, 2.0, 1.0, 7.0])


def weighted(each: Tensor, weights: Tensor, least: float = 0.0) -> Tensor:
    return (each * weights).sum() / weights.sum().clamp(min=least)


AVERAGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "over labels": lambda f, y: cross_entropy(f, y, ignore_index=IGNORED),
    "over labels, never over none": lambda f, y: weighted(token_losses(f, y), y != IGNORED, 1.0),
    "over labels and a little": lambda f, y: token_losses(f, y).sum() / ((y != IGNORED).sum() + 1e-5),
    "of classes with weights": lambda f, y: cross_entropy(f, y, WEIGHTS.to(f), ignore_index=IGNORED),
    "of smoothed labels": lambda f, y: cross_entropy(f, y, ignore_index=IGNORED, label_smoothing=0.1),
    "by length": lambda f, y: weighted(token_losses(f, y).sum(1), (y != IGNORED).sum(1)),
    "of rare tokens": lambda f, y: weighted(token_losses(f, y) * (1 - (-token_losses(f, y)).exp()) ** 2, y != IGNORED),
    "less than zero": lambda f, y: -cross_entropy(f, y, ignore_index=IGNORED),
    "of hinges": lambda f, y: weighted((1 - f[:, 0]).relu(), y != IGNORED),
    "a sum over a number": lambda f, y: token_losses(f, y).sum() / 100,
}


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)


class Averaging(Tagger):
    def __init__(self, name: str):
        super().__init__()
        self.average = AVERAGES[name]

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.average(logits.movedim(-1, 1), labels)


def padded(seed: int, n: int = 5) -> dict[str, Tensor]:
    """A batch in which a sample, the first or another one, has no label now and then."""
    batch = tagged(n, 6)
    if seed % 3:
        batch["labels"][0 if seed % 3 == 1 else 1 + seed % (n - 1)] = IGNORED
    return batch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", AVERAGES)
def test_averages_by_whatever_counts_are_exact(name: str, dtype: torch.dtype) -> None:
    """Before training, and for a model whose logits are large; each with no sample, the first or another without a label."""
    for seed in (0, 1, 2, 3, 7, 11):
        torch.manual_seed(seed)
        model, batch = Averaging(name).to(dtype), padded(seed)
        if seed % 4 == 3:
            model.last.weight.data *= 20
        report = fisher_report(model, "model", batch, progress=False)
        loss = model(**batch).logits.detach().requires_grad_()
        (own,) = torch.autograd.grad(model.of_labels(loss, batch["labels"]), loss)
        scale = len(own) if report.attrs["reduction"] == "mean" else 1
        bias = (own.sum(1) * scale).square().sum(1)
        expected = float(bias.mean() if report.attrs["reduction"] == "mean" else bias.sum())
        rel = 1e-8 if dtype is torch.float64 else 1e-4
        assert report.loc["last.bias", "fisher_trace"] == pytest.approx(expected, rel=rel), seed


@pytest.mark.parametrize(("combined", "raises"), [(Tensor.mean, False), (COMPARING["root of the mean"], True)])
def test_a_model_that_takes_no_other_parameters_is_looked_at_where_it_is(combined: Combined, raises: bool) -> None:
    class Checked(Classifier):
        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            if float(self.net[0].weight.detach().abs().max()) > 1:
                raise ValueError("no such parameters")
            return super().forward(x, labels)

    model = Checked(combined).double()
    batch = {"x": torch.randn(6, 4).double(), "labels": torch.randint(3, (6,))}
    assert refused(lambda: fisher_report(model, "model", batch, progress=False)) == raises


# ------------------------------------------------------------------------------------------------ other parameters


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.zero = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()) + self.zero


def test_other_parameters_are_there_for_the_time_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also tied ones, under all of their names, and when the model raises."""
    model, x = Pair(), torch.randn(2, 3)
    before: Mapping[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    versions = {name: p._version for name, p in before.items()}
    here = DifferentiableModel(model, ParameterTable(model), x)
    there = here.elsewhere(1.0, 0)
    assert not torch.allclose(here(x), there(x))
    assert torch.equal(there(x), there(x))
    loss = there(x).sum()
    (gradient,) = torch.autograd.grad(loss, model.zero)
    assert torch.equal(gradient, torch.full((3,), 2.0)), "the leaves are the model's own"
    seen: list[bool] = []

    def look(module: nn.Module, args: Any) -> None:
        seen.append(model.first.weight is model.second.weight and model.first.weight is not before["first.weight"])
        raise KeyboardInterrupt

    model.second.register_forward_pre_hook(look)
    with pytest.raises(KeyboardInterrupt):
        there(x)
    assert seen == [True]
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    assert all(after[name] is p and p._version == versions[name] for name, p in before.items())
