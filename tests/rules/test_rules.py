"""Every layer and every way of using it, against a loop over samples and against vmap(grad)."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from model_state import hooks
from oracles import (
    assert_equal,
    batch_size,
    call,
    mapped,
    per_sample_gradients,
    per_sample_squared_norms,
    squared_norms,
    total,
    trace,
    vmap_gradients,
)
from problems import AWKWARD, PROBLEMS, Problem, every_problem, of_problems, repeats
from torch_secorder import FisherMonitor

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),  # torch, about its own speed
    pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning"),  # torch.func, likewise
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),  # re-entrant checkpoints
]

both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


@cache
def sample_gradients(problem: Problem) -> dict[str, Tensor]:
    setting = problem.setting()
    return per_sample_gradients(setting.model, nn.MSELoss(), setting.inputs, setting.targets)


@cache
def sample_sums(problem: Problem) -> dict[str, Tensor]:
    """t_{n,p} of the summed squared error, which is the mean one's times elements^2."""
    setting = problem.setting()
    elements = setting.targets[0].numel()
    return {name: t * elements**2 for name, t in squared_norms(sample_gradients(problem)).items()}


def squares(problem: Problem, reduction: str) -> dict[str, Tensor]:
    return squared_norms(sample_gradients(problem)) if reduction == "mean" else sample_sums(problem)


@every_problem
def test_trace_equals_a_loop_over_samples(problem: Problem) -> None:
    """The reduction is applied after the rules, and the dtype inside of them: two pairs have each with each problem."""
    for dtype, reduction in ((torch.float64, "mean"), (torch.float32, "sum")):
        expected = trace(squares(problem, reduction), reduction)
        setting = problem.setting(dtype)
        with FisherMonitor(setting.model, reduction=reduction) as monitor:
            setting.loss(reduction).backward()
        report = monitor.report()
        assert list(report.index) == list(expected)
        for name, value in expected.items():
            assert_equal(torch.tensor(report.loc[name, "fisher_trace"]), value, total(expected), dtype)
        assert_equal(monitor.trace, total(expected), total(expected), dtype)
        assert monitor.n_samples == batch_size(setting.inputs)


# Along one axis or three, the tests of the convolutions themselves hold diagonals in every setting, and sums beside them.
@of_problems(p for p in PROBLEMS if not repeats(p))
def test_diagonal_and_per_sample_equal_a_loop_over_samples(problem: Problem) -> None:
    expected = sample_gradients(problem)
    squared = squared_norms(expected)
    setting = problem.setting()
    with FisherMonitor(setting.model, diagonal=True, per_sample=True) as monitor:
        setting.loss().backward()
    everything = total(trace(squared))
    assert list(monitor.diagonal) == list(expected)
    assert list(monitor.per_sample.columns) == list(expected)
    for name, gradient in expected.items():
        assert_equal(monitor.diagonal[name], gradient.square().mean(0), everything)
        assert_equal(torch.tensor(monitor.per_sample[name].to_numpy()), squared[name], everything * len(gradient))


@of_problems(p for p in PROBLEMS if not p.no_vmap and not repeats(p))
def test_the_loop_over_samples_equals_vmap_of_grad(problem: Problem) -> None:
    """So that what equals the one equals the other."""
    setting = problem.setting()
    found = vmap_gradients(setting.model, nn.MSELoss(), setting.inputs, setting.targets)
    expected = sample_gradients(problem)
    assert found.keys() == expected.keys()
    magnitude = total(trace(squared_norms(expected))).sqrt()
    for name, gradients in expected.items():
        torch.testing.assert_close(found[name], gradients, rtol=1e-9, atol=1e-11 * float(magnitude))


@of_problems(p for p in PROBLEMS if not repeats(p))
def test_one_sample_conserves_the_gradient(problem: Problem) -> None:
    """With one sample the Fisher is the square of the gradient that autograd gives, element by element."""
    setting = problem.setting()
    setting.inputs = mapped(setting.inputs, lambda tensor: tensor[:1])
    setting.targets = setting.targets[:1]
    with FisherMonitor(setting.model, reduction="sum", diagonal=True) as monitor:
        setting.loss("sum").backward()
    squared = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.to_dense().square()
        for name, p in setting.model.named_parameters()
        if p.requires_grad
    }
    report = monitor.report()
    for name, square in squared.items():
        assert_equal(monitor.diagonal[name], square, total(squared))
        if (square != 0).any():
            assert_equal(torch.tensor(report.loc[name, "grad_sq_norm"]), square.sum(), total(squared), torch.float64)


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.name.startswith("frozen")], ids=str)
@both_dtypes
def test_frozen_parameters_are_analyzed_on_request(problem: Problem, dtype: torch.dtype) -> None:
    setting = problem.setting()
    expected = trace(
        per_sample_squared_norms(setting.model, nn.MSELoss(), setting.inputs, setting.targets, parameters="all")
    )
    setting = problem.setting(dtype)
    flags = {name: p.requires_grad for name, p in setting.model.named_parameters()}
    with FisherMonitor(setting.model, parameters="all") as monitor:
        setting.loss().backward()
    report = monitor.report()
    assert list(report.index) == list(expected) == list(flags)
    for name, value in expected.items():
        assert_equal(torch.tensor(report.loc[name, "fisher_trace"]), value, total(expected), dtype)
    assert {name: p.requires_grad for name, p in setting.model.named_parameters()} == flags
    assert all(p.grad is None for p in setting.model.parameters() if not p.requires_grad)


def test_a_wholly_frozen_model_is_analyzed_on_request() -> None:
    setting = next(p for p in PROBLEMS if p.name == "use-vision_net").setting()
    expected = trace(per_sample_squared_norms(setting.model, nn.MSELoss(), setting.inputs, setting.targets))
    setting.model.requires_grad_(False)
    with FisherMonitor(setting.model, parameters="all") as monitor:
        setting.loss().backward()
    for name, value in expected.items():
        assert_equal(torch.tensor(monitor.report().loc[name, "fisher_trace"]), value, total(expected), torch.float64)
    assert all(p.grad is None and not p.requires_grad for p in setting.model.parameters())


@pytest.mark.parametrize("problem", AWKWARD, ids=str)
@both_dtypes
def test_an_awkward_use_is_exact(problem: Problem, dtype: torch.dtype) -> None:
    setting = problem.setting(dtype)
    expected = per_sample_squared_norms(setting.model, nn.MSELoss(), setting.inputs, setting.targets)
    before = hooks(setting.model)
    with FisherMonitor(setting.model, per_sample=True) as monitor:
        setting.loss().backward()
    report, everything = monitor.report(), total(trace(expected))
    assert list(report.index) == list(expected)
    for name, t in expected.items():
        assert_equal(torch.tensor(report.loc[name, "fisher_trace"]), t.mean(), everything, dtype)
        assert_equal(torch.tensor(monitor.per_sample[name].to_numpy()), t, everything * len(t), dtype)
    assert hooks(setting.model) == before


@both_dtypes
@pytest.mark.parametrize(
    ("name", "reduction"), [("linear-deep", "mean"), ("conv-2d-deep", "mean"), ("use-attention", "sum")]
)
def test_two_halves_are_one_batch(name: str, reduction: str, dtype: torch.dtype) -> None:
    setting = next(p for p in PROBLEMS if p.name == name).setting(dtype)
    loss_fn = nn.MSELoss(reduction=reduction)
    with FisherMonitor(setting.model, reduction=reduction) as whole:
        loss_fn(call(setting.model, setting.inputs), setting.targets).backward()
    with FisherMonitor(setting.model, reduction=reduction) as halves:
        for part in (slice(0, 1), slice(1, None)):
            loss_fn(call(setting.model, setting.inputs[part]), setting.targets[part]).backward()
    for figure in ("fisher_trace", "fisher_trace_stderr"):
        mine, other = (torch.tensor(m.report()[figure].to_numpy()) for m in (halves, whole))
        assert_equal(mine, other, whole.trace, dtype)


@both_dtypes
def test_sum_is_n_times_mean(dtype: torch.dtype) -> None:
    """The same samples' losses: c * sum_n t_n is N times larger under "sum"."""
    setting = next(p for p in PROBLEMS if p.name == "linear-deep").setting(dtype)
    labels = setting.targets.argmax(1)
    values = {}
    for reduction in ("mean", "sum"):
        with FisherMonitor(setting.model, reduction=reduction) as monitor:
            nn.CrossEntropyLoss(reduction=reduction)(setting.model(setting.inputs), labels).backward()
        values[reduction] = monitor.trace
    assert_equal(values["sum"], len(labels) * values["mean"], values["sum"], dtype)
