"""fisher_report checks one sample against plain autograd, and so catches what no hook can see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expectations import expectation
from model_state import assert_unchanged, hooks, state
from oracles import assert_equal, per_sample_squared_norms, total, trace
from problems import AWKWARD, PROBLEMS, Problem
from torch_secorder import empirical_fisher_trace, fisher_report, register_rule
from torch_secorder.errors import CurvatureError, VerificationError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),
]


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(n: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_what_is_exact_passes(problem: Problem) -> None:
    """In float32, where rounding must not pass for a mistake."""
    setting = problem.setting()
    expected = trace(per_sample_squared_norms(setting.model, nn.MSELoss(), setting.inputs, setting.targets))
    setting = problem.setting(torch.float32)
    report = fisher_report(setting.model, nn.MSELoss(), (setting.inputs, setting.targets), progress=False)
    for name, value in expected.items():
        assert_equal(torch.tensor(report.loc[name, "fisher_trace"]), value, total(expected), torch.float32)


@pytest.mark.parametrize("problem", AWKWARD, ids=str)
def test_an_awkward_use(problem: Problem) -> None:
    setting = problem.setting()
    expected = trace(per_sample_squared_norms(setting.model, nn.MSELoss(), setting.inputs, setting.targets))
    setting = problem.setting()
    before = hooks(setting.model)
    with expectation(problem.refusal):
        report = fisher_report(setting.model, nn.MSELoss(), (setting.inputs, setting.targets), progress=False)
        for name, value in expected.items():
            assert_equal(torch.tensor(report.loc[name, "fisher_trace"]), value, total(expected), torch.float64)
    assert hooks(setting.model) == before


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))


def centred(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs - outputs.mean(0), targets)


@pytest.mark.parametrize("loss_fn", [contrastive, centred])
def test_a_loss_that_couples_samples(loss_fn: Callable[..., Tensor]) -> None:
    with pytest.raises(CurvatureError, match=r"(?i)sample|averages nor sums"):
        fisher_report(classifier(), loss_fn, batch(), progress=False)


class Coupled(nn.Module):
    """Subtracts the mean over the batch: no parameter, no hook, no trace."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_a_layer_that_couples_samples() -> None:
    model = nn.Sequential(nn.Linear(4, 6), Coupled(), nn.Tanh(), nn.Linear(6, 3)).double()
    before = state(model)
    with pytest.raises(CurvatureError, match=r"0\.weight"):
        fisher_report(model, nn.CrossEntropyLoss(), batch(), progress=False)
    assert_unchanged(before, model)
    assert (
        fisher_report(model, nn.CrossEntropyLoss(), batch(), progress=False, verify=False)["fisher_trace"].gt(0).all()
    )


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@register_rule(Scale)
def wrong_scale(module: Scale, call: Any) -> dict[str, Tensor]:
    return {"factor": call.grad_output}


def test_a_wrong_rule() -> None:
    model = nn.Sequential(Scale(), nn.Linear(4, 3)).double()
    with pytest.raises(CurvatureError, match=r"0\.factor") as raised:
        fisher_report(model, nn.CrossEntropyLoss(), batch(), progress=False)
    assert "1.weight" not in str(raised.value)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", [{}, {"ignore_index": 1}, {"weight": torch.tensor([0.3, 1.0, 2.0])}], ids=str)
def test_losses_with_other_normalisers_pass(options: dict[str, Any], reduction: str) -> None:
    x, y = batch(7)
    y[:3] = torch.tensor([1, 0, 2])
    loss_fn = nn.CrossEntropyLoss(reduction=reduction, **options).double()
    model = classifier()
    report = fisher_report(model, loss_fn, (x, y), progress=False)
    expected = trace(per_sample_squared_norms(model, loss_fn, x, y, shares_of=reduction), reduction)
    for name, value in expected.items():
        assert_equal(torch.tensor(report.loc[name, "fisher_trace"]), value, total(expected), torch.float64)


def test_a_model_with_dropout_passes_and_is_not_reseeded() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double().train()
    data = batch()
    before, random_state = state(model), torch.get_rng_state()
    first = fisher_report(model, nn.CrossEntropyLoss(), data, progress=False)
    assert_unchanged(before, model)
    torch.set_rng_state(random_state)
    second = fisher_report(model, nn.CrossEntropyLoss(), data, progress=False, verify=False)
    assert list(first["fisher_trace"]) == list(second["fisher_trace"]), "verifying draws nothing of the analysis's"


def test_a_model_that_couples_samples_behind_dropout() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), Coupled(), nn.Linear(6, 3)).double().train()
    with pytest.raises(CurvatureError, match=r"0\.weight"):
        fisher_report(model, nn.CrossEntropyLoss(), batch(), progress=False)


@pytest.mark.parametrize("fisher", ["exact", "sampled", "observed"])
def test_every_fisher_is_verified(fisher: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), Coupled(), nn.Tanh(), nn.Linear(6, 3)).double()
    with pytest.raises(CurvatureError, match=r"0\.weight"):
        fisher_report(model, None, batch(), fisher=fisher, progress=False)


class Centred(nn.Module):
    """The batch's mean is subtracted, which couples samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32)), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h - 0.5 * h.mean(0) * (len(x) > 1))


@pytest.mark.parametrize("seed", range(3))
def test_samples_that_a_trained_model_couples(seed: int) -> None:
    """Small gradients are no rounding."""
    torch.manual_seed(seed)
    x = torch.randn(64, 20)
    y = (x[:, 0] > 0).long()
    x[:, 0] += 2 * y - 1
    model = Centred()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    with pytest.raises(VerificationError):
        empirical_fisher_trace(model, nn.functional.cross_entropy, x, y)


class WithLargeNumbers(nn.Module):
    """Returns what the loss doesn't use, in large units."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 4), Scale()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x).tanh()
        return self.last(h), 1000 * h


def test_a_wrong_rule_beside_outputs_that_the_loss_does_not_use() -> None:
    x, y = torch.randn(5, 6), torch.randn(5, 4)
    with pytest.raises(VerificationError, match=r"last\.factor"):
        fisher_report(WithLargeNumbers(), lambda out, y: nn.functional.mse_loss(out[0], y), (x, y), progress=False)
