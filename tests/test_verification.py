"""fisher_report checks one sample against plain autograd, and so catches what no hook can see."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expectations import expectation
from model_state import assert_unchanged, hooks, state
from oracles import assert_equal, per_sample_squared_norms, total, trace
from problems import AWKWARD, PROBLEMS, Problem, repeats
from torch_secorder import (
    FisherMonitor,
    empirical_fisher_trace,
    fisher_report,
    generalized_fisher_trace,
    hessian_trace,
    register_rule,
)
from torch_secorder.errors import (
    ArgumentError,
    CurvatureError,
    LifecycleError,
    SlowFallbackWarning,
    VerificationError,
)
from torch_secorder.running.analysis import Analysis
from torch_secorder.verification import empirical

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),
]


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(n: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))


@pytest.mark.parametrize("problem", [problem for problem in PROBLEMS if not repeats(problem)], ids=str)
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


def centered(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs - outputs.mean(0), targets)


@pytest.mark.parametrize("loss_fn", [contrastive, centered])
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


@pytest.mark.parametrize(
    "way",
    [
        lambda model, x, y: fisher_report(model, F.cross_entropy, (x, y), progress=False),
        lambda model, x, y: empirical_fisher_trace(model, F.cross_entropy, x, y),
    ],
    ids=["fisher_report", "empirical_fisher_trace"],
)
def test_a_wrong_rule(way: Callable[..., Any]) -> None:
    """No check asks a rule whether it is right."""
    model = nn.Sequential(Scale(), nn.Linear(4, 3)).double()
    with pytest.raises(VerificationError, match=r"0\.factor") as raised:
        way(model, *batch())
    assert "1.weight" not in str(raised.value)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", [{}, {"ignore_index": 1}, {"weight": torch.tensor([0.3, 1.0, 2.0])}], ids=str)
def test_losses_with_other_normalizers_pass(options: dict[str, Any], reduction: str) -> None:
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


class Centered(nn.Module):
    """The batch's mean is subtracted, which couples samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32)), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h - 0.5 * h.mean(0) * (len(x) > 1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_samples_that_a_trained_model_couples(seed: int) -> None:
    """Small gradients are no rounding."""
    torch.manual_seed(seed)
    x = torch.randn(64, 20)
    y = (x[:, 0] > 0).long()
    x[:, 0] += 2 * y - 1
    model = Centered()
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


# When it is checked


def test_the_functions_check_the_1st_2nd_3rd_5th_and_9th_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    checked: list[int] = []
    verify = empirical.verify_samples

    def counted(analysis: Any, loss: Any, inputs: Any, result: Any, samples: Any) -> None:
        checked.append(len(calls) + 1)
        verify(analysis, loss, inputs, result, samples)

    monkeypatch.setattr(empirical, "verify_samples", counted)
    model, (x, y) = classifier(), batch()
    for _ in range(11):
        calls.append(empirical_fisher_trace(model, F.cross_entropy, x, y))
    assert checked == [1, 2, 3, 5, 9]


def test_a_function_that_computes_another_loss_is_checked_again() -> None:
    """As one does that reads a setting from outside: here, whether outputs are centered over the batch."""
    model, (x, y) = classifier(), batch()
    centers = False

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs - outputs.mean(0) if centers else outputs, targets)

    expected = total(trace(per_sample_squared_norms(model, F.cross_entropy, x, y)))
    for _ in range(3):
        assert_equal(empirical_fisher_trace(model, loss, x, y), expected, expected, torch.float64)
    centers = True
    for _ in range(3):
        with pytest.raises(VerificationError, match="other samples' outputs"):
            empirical_fisher_trace(model, loss, x, y)


@pytest.mark.parametrize("checked", ["always", "never", "when due"])
def test_outputs_are_kept_for_a_check_only(checked: Any) -> None:
    """They are as large as all else in a language model."""
    analysis, (x, y) = Analysis(classifier()), batch()
    kept = [analysis.empirical(F.cross_entropy, x, y, checked=checked).outputs is not None for _ in range(5)]
    assert kept == {"always": [True] * 5, "never": [False] * 5, "when due": [True, True, True, False, True]}[checked]


@pytest.mark.parametrize("sample", range(5))
def test_any_sample_can_be_looked_at(sample: int) -> None:
    analysis, (x, y) = Analysis(classifier()), batch()
    found = analysis.empirical(F.cross_entropy, x, y)
    empirical.verify_empirical(analysis, F.cross_entropy, x, y, found, range(5))
    found.samples.squared_norms[1, sample] *= 1.001
    for other in range(5):
        if other != sample:
            empirical.verify_empirical(analysis, F.cross_entropy, x, y, found, [other])
    with pytest.raises(VerificationError, match=rf"sample {sample}: (?s:.*)0\.bias"):
        empirical.verify_empirical(analysis, F.cross_entropy, x, y, found, range(5))


# Half precision


class InAutocast(nn.Module):
    """Two layers; float32 comes out, whatever they computed in."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.a, self.b, self.dtype = nn.Linear(64, 64), nn.Linear(64, 3), dtype

    def forward(self, x: Tensor) -> Tensor:
        if self.dtype is None:
            return self.b(self.a(x).tanh()).float()
        with torch.autocast("cpu", self.dtype):
            return self.b(self.a(x).tanh()).float()


@pytest.mark.parametrize("seed", range(8))
def test_outputs_in_float32_of_a_model_under_autocast(seed: int) -> None:
    torch.manual_seed(seed)
    model, x, y = InAutocast(), torch.randn(16, 64), torch.randint(3, (16,))
    expected = total(trace(per_sample_squared_norms(model, F.cross_entropy, x, y)))
    with torch.autocast("cpu", torch.bfloat16):
        report = fisher_report(model, F.cross_entropy, (x, y), progress=False)
        value = empirical_fisher_trace(model, F.cross_entropy, x, y)
    assert report["fisher_trace"].sum() == pytest.approx(float(expected), rel=2e-2)
    assert float(value) == pytest.approx(float(expected), rel=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_a_model_that_is_under_autocast_by_itself(seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    model, x, y = InAutocast(dtype), torch.randn(16, 64), torch.randint(3, (16,))
    plain = InAutocast()
    plain.load_state_dict(model.state_dict())
    expected = total(trace(per_sample_squared_norms(plain, F.cross_entropy, x, y)))
    report = fisher_report(model, F.cross_entropy, (x, y), progress=False)
    assert report["fisher_trace"].sum() == pytest.approx(float(expected), rel=2e-2)
    exact = fisher_report(plain, None, (x, None), fisher="exact", progress=False)["fisher_trace"].sum()
    value = generalized_fisher_trace(model, model(x), None)  # which warns if its check fails
    assert float(value) == pytest.approx(exact, rel=2e-2)
    with FisherMonitor(model) as monitor:
        outputs = model(x)
        loss = F.cross_entropy(outputs, y)
        monitor.verify(loss)
        loss.backward()
    assert float(monitor.trace) == pytest.approx(float(expected), rel=2e-2)


def test_marks_of_samples_fit_into_the_half_precision_behind_float32_outputs() -> None:
    """As many positions as samples, so that shapes leave open which axis is which."""

    class Ambiguous(InAutocast):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean(1)

    model, x, y = Ambiguous(torch.float16), torch.randn(16, 16, 64), torch.randint(3, (16,))
    with FisherMonitor(model) as monitor:
        F.cross_entropy(model(x), y).backward()
    model.dtype = None
    expected = total(trace(per_sample_squared_norms(model, F.cross_entropy, x, y)))
    assert float(monitor.trace) == pytest.approx(float(expected), rel=2e-2)


def test_a_loss_that_averages_in_half_precision() -> None:
    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.bfloat16() - targets).square().mean(1).mean().float()

    for seed in range(5):
        torch.manual_seed(seed)
        model, x, y = nn.Linear(4, 3), torch.randn(33, 4), torch.randn(33, 3)
        value = float(empirical_fisher_trace(model, loss_fn, x, y))
        expected = total(trace(per_sample_squared_norms(model, F.mse_loss, x, y)))
        assert value == pytest.approx(float(expected), rel=3e-2)


def test_a_loss_that_overflows_is_not_taken_for_an_average() -> None:
    """Its gradient is finite, and a sum's counts N times as much as that of a mean; in float32 the loss shows which it is."""
    model, x, y = nn.Linear(4, 3).half(), torch.ones(5, 4).half(), torch.full((5, 3), 300.0).half()

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum()

    assert not loss_fn(model(x), y).isfinite()
    found = empirical_fisher_trace(model, loss_fn, x, y)
    squared = per_sample_squared_norms(copy.deepcopy(model).double(), loss_fn, x.double(), y.double(), shares_of="sum")
    assert float(found) == pytest.approx(float(total(trace(squared, "sum"))), rel=1e-2)
    with pytest.raises(ArgumentError, match="neither averages nor sums"):
        empirical_fisher_trace(model, lambda o, t: loss_fn(o.half(), t.half()), x, y)


# What is no number


class Standardized(nn.Module):
    """Divides by the standard deviation over the batch, which one sample alone has not."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.std(0)


@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_a_sample_that_is_nan_alone_does_not_pass(fisher: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), Standardized(), nn.Linear(6, 3)).double()
    x, y = batch()
    with pytest.raises(VerificationError, match="nan alone"):
        fisher_report(model, F.cross_entropy, (x, y), fisher=fisher, progress=False)
    with pytest.raises(VerificationError, match="nan alone"):
        empirical_fisher_trace(model, F.cross_entropy, x, y)


# What a sample alone looks like


class Squeezed(nn.Module):
    """One number for each sample, and for one sample no axis at all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).squeeze()


def test_outputs_that_are_squeezed() -> None:
    model, x, y = Squeezed().double(), torch.randn(5, 4).double(), torch.randn(5).double()
    weight = torch.cat([x, torch.ones(5, 1)], 1).square().sum(1)
    expected = (4 * (model(x) - y).square() * weight).mean()
    report = fisher_report(model, nn.MSELoss(), (x, y), progress=False)
    assert_equal(torch.tensor(report["fisher_trace"].sum()), expected, expected, torch.float64)
    assert_equal(empirical_fisher_trace(model, nn.MSELoss(), x, y), expected, expected)


class Summary(nn.Module):
    """Returns more for a batch than for one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.layer(x)
        return [y, y.detach()] if len(x) > 1 else [y]


def test_outputs_of_another_kind_for_one_sample_are_refused() -> None:
    x, y = batch()
    with pytest.raises(VerificationError, match="2 tensors for a batch and 1 for one"):
        fisher_report(Summary().double(), lambda out, y: F.cross_entropy(out[0], y), (x, y), progress=False)


# Hooks of the user's on parameters


def tripled(model: nn.Module) -> list[Tensor]:
    """Has the user's own hook on a parameter, and what it was called with."""
    seen: list[Tensor] = []

    def hook(grad: Tensor) -> Tensor:
        seen.append(grad)
        return 3 * grad

    next(model.parameters()).register_hook(hook)
    return seen


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "fisher_report": lambda m, x, y: fisher_report(m, F.cross_entropy, (x, y), progress=False)["fisher_trace"].sum(),
    "exact": lambda m, x, y: fisher_report(m, None, (x, y), fisher="exact", progress=False)["fisher_trace"].sum(),
    "empirical": lambda m, x, y: float(empirical_fisher_trace(m, F.cross_entropy, x, y)),
    "generalized": lambda m, x, y: float(generalized_fisher_trace(m, m(x), y)),
    "hessian": lambda m, x, y: hessian_trace(
        *(m, F.cross_entropy, x, y, 4), generator=torch.Generator().manual_seed(0)
    ).attrs["trace"],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_functions_run_no_hook_of_the_users_on_a_parameter(name: str) -> None:
    model, (x, y) = classifier(), batch()
    expected = FUNCTIONS[name](model, x, y)
    seen, before = tripled(model), hooks(model)
    assert FUNCTIONS[name](model, x, y) == pytest.approx(expected, rel=1e-12)
    assert not seen
    assert hooks(model) == before
    F.cross_entropy(model(x), y).backward()
    assert len(seen) == 1


def test_samples_one_by_one_run_no_hook_of_the_users_either() -> None:
    model, (x, y) = nn.Sequential(nn.Linear(4, 6), Coupled(), nn.Linear(6, 3)).double(), batch()
    monkey = pytest.MonkeyPatch()
    for name in ("of_seed", "of_seeds"):
        monkey.setattr(f"torch_secorder.running.outputs_backward.OutputsBackward.{name}", refused)
    with monkey.context(), pytest.warns(SlowFallbackWarning, match="backward pass of its own"):
        expected = generalized_fisher_trace(model, model(x), y)
        seen = tripled(model)
        assert_equal(generalized_fisher_trace(model, model(x), y), expected, expected)
    monkey.undo()
    assert not seen


def refused(*_: Any, **__: Any) -> Any:
    raise VerificationError("not this time")


def test_a_monitors_check_runs_no_hook_of_the_users_of_its_own() -> None:
    model, (x, y) = classifier(), batch()
    expected = total(trace(per_sample_squared_norms(model, F.cross_entropy, x, y)))
    seen = tripled(model)
    with FisherMonitor(model) as monitor:
        outputs = model(x)
        loss = F.cross_entropy(outputs, y)
        monitor.verify(loss)
        assert not seen
        loss.backward()
    assert len(seen) == 1
    assert_equal(monitor.trace, expected, expected, torch.float64)


def test_a_monitor_of_frozen_parameters_can_be_verified() -> None:
    """By those that have a gradient in the user's graph."""
    model, (x, y) = classifier(), batch()
    model[0].requires_grad_(False)
    with FisherMonitor(model, parameters="all") as monitor:
        outputs = model(x)
        loss = F.cross_entropy(outputs, y)
        monitor.verify(loss)
        loss.backward()
    expected = trace(per_sample_squared_norms(model, F.cross_entropy, x, y, parameters="all"))
    assert_equal(monitor.trace, total(expected), total(expected), torch.float64)


def apart(model: nn.Module, losses: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """The mean over samples of the squared gradients of their losses, which are computed for one sample at a time."""
    rows = [torch.autograd.grad(losses(model, x[n : n + 1]).sum(), list(model.parameters())) for n in range(len(x))]
    names = [name for name, _ in model.named_parameters()]
    return {
        name: torch.stack(list(g)).square().sum() / len(x)
        for name, g in zip(names, zip(*rows, strict=True), strict=True)
    }


def distances(model: nn.Module, x: Tensor) -> Tensor:
    """The losses of pairs, each of an input and the same input turned round."""
    return (model(x) - model(x.flip(1))).square().sum(1)


def assert_traces(monitor: FisherMonitor, expected: dict[str, Tensor]) -> None:
    everything = torch.stack(list(expected.values())).sum()
    for name, t in expected.items():
        assert_equal(torch.tensor(monitor.report().loc[name, "fisher_trace"]), t, everything, torch.float64)


def test_verify_of_a_loss_of_several_calls() -> None:
    """Rows of several calls that are one sample are looked at together. Otherwise it says what to do, and that is right."""
    model, (x, _) = classifier(), batch()
    with FisherMonitor(model, repeated_calls="same") as monitor:
        first, second = model(x), model(x.flip(1))
        loss = (first - second).square().sum(1).mean()
        monitor.verify(loss)
        loss.backward()
    assert_traces(monitor, apart(model, distances, x))
    with FisherMonitor(model, repeated_calls="new", loss_scale=2) as monitor:
        first, second = model(x), model(x.flip(1))
        with pytest.raises(
            LifecycleError, match=r"of 2 calls of the model, whose samples.*in a backward pass of its own"
        ):
            monitor.verify(first.square().sum(1).mean() + second.square().sum(1).mean())
        for outputs in (first, second):
            loss = 2 * outputs.square().sum(1).mean()
            monitor.verify(loss)
            loss.backward()
    assert_traces(monitor, apart(model, lambda m, x: m(x).square().sum(1), torch.cat([x, x.flip(1)])))


def test_verify_takes_the_call_that_the_loss_depends_on() -> None:
    """The latest call may be of a target, as in reinforcement learning."""
    model, (x, _) = classifier(), batch()
    following = torch.randn_like(x)
    for detached in (False, True):
        with FisherMonitor(model) as monitor:
            outputs = model(x)
            if detached:
                target = model(following).detach()
            else:
                with torch.no_grad():
                    target = model(following)
            with pytest.raises(LifecycleError, match=r"doesn't depend on the outputs of a call.*pass the loss that is"):
                monitor.verify(model[0].weight.sum())
            loss = (outputs - target).square().sum(1).mean()
            monitor.verify(loss)
            loss.backward()
        pairs = torch.cat([x, target], 1)
        assert_traces(monitor, apart(model, lambda m, xy: (m(xy[:, :4]) - xy[:, 4:]).square().sum(1), pairs))


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.policy, self.value = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.body(x).tanh()
        return h, self.policy(h), self.value(h)


def test_verify_when_some_of_the_outputs_are_gone() -> None:
    """Outputs that the loss depends on have to be there. One that only other outputs depend on need not."""
    model, (x, y) = Heads().double(), batch()

    def loss_of(policy: Tensor, value: Tensor) -> Tensor:
        return F.cross_entropy(policy, y) + (value - 1).square().mean()

    with FisherMonitor(model) as monitor:
        _, policy, value = model(x)
        loss = loss_of(policy, value)
        del value
        with pytest.raises(LifecycleError, match="the model's outputs are gone"):
            monitor.verify(loss)
        policy, value = model(x)[1:]
        del _
        loss = loss_of(policy, value)
        monitor.verify(loss)
        loss.backward()

    def losses(outputs: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs[1], targets) + (outputs[2] - 1).square().mean()

    expected = trace(per_sample_squared_norms(model, losses, x, y))
    assert_equal(monitor.trace, total(expected), total(expected), torch.float64)


def test_a_hook_that_changes_a_gradient_fails_verify_which_says_so() -> None:
    """Without the check, the pass is counted as the loop runs it."""

    class Halved(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            h = self[0](x)
            h.register_hook(lambda g: g / 2)
            return self[2](self[1](h))

    model, (x, y) = Halved(*classifier()).double(), batch()
    with FisherMonitor(model) as monitor:
        outputs = model(x)
        loss = F.cross_entropy(outputs, y)
        monitor.verify(loss)
        with pytest.raises(VerificationError, match=r"a hook of yours changes.*without verify\(loss\)"):
            loss.backward()
        F.cross_entropy(model(x), y).backward()
    assert_traces(
        monitor,
        apart(model, lambda m, xy: F.cross_entropy(m(xy[:, :4]), xy[:, 4].long()), torch.cat([x, y[:, None]], 1)),
    )
