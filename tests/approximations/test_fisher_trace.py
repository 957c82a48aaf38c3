"""The two functions: against explicit loops, on their own documentation, and for what they leave behind."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_secorder.running.fisher_kind
from expectations import expectation
from model_state import assert_unchanged, gradients, identical, state
from oracles import (
    assert_equal,
    batch_size,
    call,
    exact_fisher,
    per_sample_squared_norms,
    squared_norms,
    total,
    trace,
    vmap_gradients,
)
from problems import AWKWARD, BY_NAME, PROBLEMS, Problem, of_problems
from torch_secorder import fisher_report
from torch_secorder.approximations.fisher_trace import empirical_fisher_trace, generalized_fisher_trace
from torch_secorder.autograd.self_test import hooks_are_seen
from torch_secorder.batch_axis.samples import BatchSamples
from torch_secorder.errors import CurvatureError
from torch_secorder.running import trials

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),
]

LOSS_TYPES = ["nll", "bce", "mse", "poisson"]
both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
both_reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])


def classifier(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, classes)).double()


def batch(n: int = 5, classes: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4, dtype=torch.float64), torch.randint(classes, (n,))


def tagger() -> nn.Module:
    """A sequence model: (N, T) ids to (N, T, C) logits, with parameters shared by the positions."""
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()


class Transposed(nn.Module):
    """The same, with the classes on axis 1, where cross_entropy wants them."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(ids).transpose(1, 2)


# The documentation's own examples

DOCUMENTED_EMPIRICAL = """\
import torch
import torch.nn as nn
from torch_secorder.approximations.fisher_trace import empirical_fisher_trace

# Define a simple model and loss function
class SimpleModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(10, 1)

    def forward(self, x):
        return self.linear(x)

model = SimpleModel()
loss_fn = nn.MSELoss()
inputs = torch.randn(5, 10)
targets = torch.randn(5, 1)

# Estimate the Empirical Fisher Trace
efim_trace = empirical_fisher_trace(model, loss_fn, inputs, targets)

print("Empirical Fisher Trace:", efim_trace)
"""

DOCUMENTED_GENERALIZED = """\
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch_secorder.approximations.fisher_trace import generalized_fisher_trace

# Define a simple model
class SimpleModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(10, 2)

    def forward(self, x):
        return self.linear(x)

model = SimpleModel()
inputs = torch.randn(5, 10)
outputs = model(inputs)  # Logits
targets = torch.randint(0, 2, (5,)) # Class labels

# Estimate the Generalized Fisher Trace (NLL loss type)
gfim_trace = generalized_fisher_trace(model, outputs, targets, loss_type="nll")

print("Generalized Fisher Trace:", gfim_trace)
"""


def documented_examples() -> list[str]:
    """The code blocks of the documentation's page, in order."""
    page = Path(__file__).parents[2] / "docs" / "api" / "approximations" / "fisher_trace.rst"
    blocks = re.findall(r"\.\. code-block:: python\n\n((?:   .*\n|\n)+)", page.read_text())
    return [inspect.cleandoc(block) + "\n" for block in blocks]


def test_the_documentation_has_the_users_examples() -> None:
    assert documented_examples() == [DOCUMENTED_EMPIRICAL, DOCUMENTED_GENERALIZED]


def test_the_documented_empirical_example(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(DOCUMENTED_EMPIRICAL, names)
    model, inputs, targets, value = (names[key] for key in ("model", "inputs", "targets", "efim_trace"))
    residual = (model(inputs) - targets).detach()
    expected = (2 * residual).square().squeeze(1) * (inputs.square().sum(1) + 1)
    assert_equal(value, expected.mean(), expected.mean())
    assert capsys.readouterr().out == "Empirical Fisher Trace: " + str(value) + "\n"


def test_the_documented_generalized_example(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(DOCUMENTED_GENERALIZED, names)
    inputs, outputs, value = (names[key] for key in ("inputs", "outputs", "gfim_trace"))
    p = outputs.detach().softmax(1)
    expected = (1 - p.square().sum(1)) * (inputs.square().sum(1) + 1)
    assert_equal(value, expected.mean(), expected.mean())
    assert capsys.readouterr().out == "Generalized Fisher Trace: " + str(value) + "\n"


def test_signatures() -> None:
    def parameters(function: Callable[..., Any]) -> dict[str, Any]:
        return {name: (p.default, p.kind.name) for name, p in inspect.signature(function).parameters.items()}

    needed, place, keyword = inspect.Parameter.empty, "POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY"
    assert parameters(empirical_fisher_trace) == {
        **dict.fromkeys(("model", "loss_fn", "inputs", "targets"), (needed, place)),
        "num_samples": (1, place),
        "create_graph": (False, keyword),
        "verify": (True, keyword),
        "parameters": ("trainable", keyword),
        **dict.fromkeys(("batch_axis", "n_samples", "sample_of"), (None, keyword)),
    }
    assert parameters(generalized_fisher_trace) == {
        **dict.fromkeys(("model", "outputs", "targets"), (needed, place)),
        "loss_type": ("nll", place),
        "num_samples": (None, place),
        "create_graph": (False, place),
        "labels": ("model", keyword),
        "reduction": ("mean", keyword),
        "ignore_index": (-100, keyword),
        "class_axis": (1, keyword),
        "generator": (None, keyword),
        "max_passes": (10_000, keyword),
        "parameters": ("trainable", keyword),
    }
    assert torch_secorder.empirical_fisher_trace is empirical_fisher_trace
    assert torch_secorder.generalized_fisher_trace is generalized_fisher_trace


# Empirical


@of_problems(PROBLEMS[::5])
def test_empirical_trace_in_float32(problem: Problem) -> None:
    """Of every fifth problem, since the report of each is held to the same in float32, and all other drivers in float64."""
    setting = problem.setting()
    expected = total(trace(per_sample_squared_norms(setting.model, nn.MSELoss(), setting.inputs, setting.targets)))
    setting = problem.setting(torch.float32)
    value = empirical_fisher_trace(setting.model, nn.MSELoss(), setting.inputs, setting.targets)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert not value.requires_grad
    assert_equal(value, expected, expected)


@pytest.mark.parametrize("problem", AWKWARD, ids=str)
def test_empirical_trace_of_awkward_uses(problem: Problem) -> None:
    setting = problem.setting()
    expected = total(trace(per_sample_squared_norms(setting.model, nn.MSELoss(), setting.inputs, setting.targets)))
    setting = problem.setting()
    with expectation(problem.refusal):
        value = empirical_fisher_trace(setting.model, nn.MSELoss(), setting.inputs, setting.targets)
        assert_equal(value, expected, expected)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum()


LOSSES: dict[str, tuple[Callable[..., Tensor], str]] = {
    "MSELoss mean": (nn.MSELoss(), "mean"),
    "MSELoss sum": (nn.MSELoss(reduction="sum"), "sum"),
    "mse_loss": (F.mse_loss, "mean"),
    "partial of mse_loss": (partial(F.mse_loss, reduction="sum"), "sum"),
    "function": (squared_error, "sum"),
    "lambda": (lambda outputs, targets: squared_error(outputs, targets) / len(outputs), "mean"),
    "L1Loss": (nn.L1Loss(), "mean"),
    "HuberLoss sum": (nn.HuberLoss(reduction="sum"), "sum"),
    "mean plus a constant": (lambda outputs, targets: F.mse_loss(outputs, targets) + 3, "mean"),
    "negative": (lambda outputs, targets: -squared_error(outputs, targets), "sum"),
    "of 1 element": (lambda outputs, targets: F.mse_loss(outputs, targets).reshape(1), "mean"),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_reduction_is_found_out(name: str, n: int) -> None:
    loss_fn, reduction = LOSSES[name]
    model, x, y = classifier(), batch(n)[0], torch.randn(n, 3, dtype=torch.float64)
    expected = total(trace(per_sample_squared_norms(model, loss_fn, x, y), reduction))
    assert_equal(empirical_fisher_trace(model, loss_fn, x, y), expected, expected)


CROSS_ENTROPIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "class weights": {"weight": torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)},
    "ignore_index": {"ignore_index": 1},
    "both": {"weight": torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64), "ignore_index": 0},
    "label smoothing": {"label_smoothing": 0.3},
}


@pytest.mark.parametrize("name", CROSS_ENTROPIES)
@both_reductions
def test_cross_entropy_with_every_normalizer(name: str, reduction: str) -> None:
    model, (x, y) = classifier(), batch(7)
    for y[:3] in (torch.tensor([0, 1, 2]), torch.tensor([1, 0, 2])):  # the first sample may be an ignored one
        loss_fn = nn.CrossEntropyLoss(reduction=reduction, **CROSS_ENTROPIES[name])
        expected = total(trace(per_sample_squared_norms(model, loss_fn, x, y, shares_of=reduction), reduction))
        assert_equal(empirical_fisher_trace(model, loss_fn, x, y), expected, expected)


@both_reductions
def test_cross_entropy_over_positions_with_ignored_ones(reduction: str) -> None:
    model, ids, y = Transposed(tagger()), torch.randint(7, (4, 6)), torch.randint(3, (4, 6))
    y[0, :5] = y[2, 3:] = -100
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    expected = total(trace(per_sample_squared_norms(model, loss_fn, ids, y, shares_of=reduction), reduction))
    assert_equal(empirical_fisher_trace(model, loss_fn, ids, y), expected, expected)


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda outputs, targets: squared_error(outputs, targets) ** 2,
        lambda outputs, targets: squared_error(outputs, targets) * len(outputs),
        lambda outputs, targets: squared_error(outputs, targets) ** 0.5,
        lambda outputs, targets: squared_error(outputs, targets) + 1e3,
    ],
    ids=["square of the sum", "sum times N", "root of the sum", "sum plus a constant"],
)
def test_a_loss_that_neither_averages_nor_sums(loss_fn: Callable[..., Tensor]) -> None:
    with pytest.raises(CurvatureError, match=r"(?i)neither|average.*sum|mean.*sum") as raised:
        empirical_fisher_trace(classifier(), loss_fn, batch()[0], torch.randn(5, 3, dtype=torch.float64))
    assert isinstance(raised.value, ValueError)


def clamped(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none").clamp(max=1.5)


def one_by_one(outputs: Tensor, targets: Tensor) -> Tensor:
    """Adds up in the precision of the outputs; in bfloat16 terms of 1 are lost from 256 on."""
    return sum((F.cross_entropy(outputs[n : n + 1], targets[n : n + 1]) for n in range(len(outputs))), torch.zeros(()))


IN_HALF_PRECISION: dict[str, tuple[Callable[..., Tensor], str]] = {
    "cross entropy": (F.cross_entropy, "mean"),
    "cross entropy, sum": (nn.CrossEntropyLoss(reduction="sum"), "sum"),
    "NLL": (lambda outputs, targets: F.nll_loss(F.log_softmax(outputs, -1), targets), "mean"),
    "NLL, sum": (lambda outputs, targets: F.nll_loss(F.log_softmax(outputs, -1), targets, reduction="sum"), "sum"),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), "mean"),
    "smoothed, sum": (nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum"), "sum"),
    "clamped": (lambda outputs, targets: clamped(outputs, targets).mean(), "mean"),
    "clamped, sum": (lambda outputs, targets: clamped(outputs, targets).sum(), "sum"),
    "one by one": (one_by_one, "sum"),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", IN_HALF_PRECISION)
def test_the_reduction_is_found_out_in_half_precision(name: str, dtype: torch.dtype) -> None:
    """Rounding changes the losses by up to 0.4 per cent. The weights and inputs are the same in float64."""
    loss_fn, reduction = IN_HALF_PRECISION[name]
    for n in (5, 33, 64, 257):
        model, x, y = classifier().to(dtype), torch.randn(n, 4).to(dtype), torch.randint(3, (n,))
        expected = total(trace(squared_norms(vmap_gradients(model, loss_fn, x, y)), reduction))
        assert float(empirical_fisher_trace(model, loss_fn, x, y)) == pytest.approx(float(expected), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="sum") ** 2,
        lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="sum") * len(outputs),
        lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="sum") ** 0.5,
        lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="sum") / len(outputs) ** 0.5,
        lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="sum") / (len(outputs) + 1),
        lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="sum") + 1e3,
    ],
    ids=["square", "times N", "root", "over the root of N", "over N + 1", "plus a constant"],
)
def test_a_loss_that_neither_averages_nor_sums_in_half_precision(
    loss_fn: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    for n in (2, 8, 64):
        model, x, y = classifier().to(dtype), torch.randn(n, 4).to(dtype), torch.randint(3, (n,))
        with pytest.raises(CurvatureError, match="neither averages nor sums"):
            empirical_fisher_trace(model, loss_fn, x, y)


def test_a_loss_with_weights_in_half_precision_is_tried_in_float32_if_it_is_a_module() -> None:
    """Cross entropy takes weights of the outputs' dtype only. A module can be converted, and a function can't."""
    model, x, y = classifier().bfloat16(), torch.randn(64, 4).bfloat16(), torch.randint(3, (64,))
    weight = torch.tensor([0.25, 1.0, 4.0])
    expected = empirical_fisher_trace(model.double(), nn.CrossEntropyLoss(weight.double()), x.double(), y)
    module = nn.CrossEntropyLoss(weight).bfloat16()
    found = empirical_fisher_trace(model.bfloat16(), module, x, y)
    assert float(found) == pytest.approx(float(expected), rel=0.05)
    assert module.weight is not None
    assert module.weight.dtype == torch.bfloat16
    for constant in (0.0, 1e3):
        rounded = lambda o, t, c=constant: F.cross_entropy(o, t, weight=weight.bfloat16(), reduction="sum") + c  # noqa: E731
        with pytest.raises(CurvatureError, match=r"rounding hides .* let it convert the outputs"):
            empirical_fisher_trace(model, rounded, x, y)
    remedied = empirical_fisher_trace(model, lambda o, t: F.cross_entropy(o.float(), t, weight=weight), x, y)
    assert float(remedied) == pytest.approx(float(expected), rel=0.05)


def test_a_loss_that_takes_half_precision_only_is_told_where_its_changes_are_larger_than_rounding() -> None:
    model, x, y = classifier().bfloat16(), 8 * torch.randn(16, 4).bfloat16(), torch.randint(3, (16,))
    weight = torch.tensor([0.25, 1.0, 4.0])
    with torch.no_grad():
        model[2].weight.mul_(64)
    for reduction in ("mean", "sum"):
        full = nn.CrossEntropyLoss(weight.double(), reduction=reduction)
        expected = empirical_fisher_trace(copy.deepcopy(model).double(), full, x.double(), y)
        half = partial(F.cross_entropy, weight=weight.bfloat16(), reduction=reduction)
        assert float(empirical_fisher_trace(model, half, x, y)) == pytest.approx(float(expected), rel=0.05)


def test_of_large_outputs_some_samples_are_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are copied several times for that. The first and the last are among them."""
    sizes: list[int] = []

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        sizes.append(len(outputs))
        return F.cross_entropy(outputs, targets)

    model, (x, y) = classifier(), batch(50)
    expected = total(trace(per_sample_squared_norms(model, F.cross_entropy, x, y)))
    for most, largest in ((150, 100), (30, 50), (1, 50)):
        monkeypatch.setattr(trials, "MOST_NUMBERS", most)
        sizes.clear()
        assert_equal(empirical_fisher_trace(copy.deepcopy(model), loss_fn, x, y), expected, expected)
        assert max(sizes) == largest
    monkeypatch.setattr(trials, "MOST_NUMBERS", 100)
    seen = [trials.Trials(loss_fn, y, BatchSamples(50), 0.1).samples(torch.zeros(50, size)) for size in (1, 2, 20, 999)]
    assert [len(index) for index in seen] == [50, 50, 5, 2]
    assert seen[2:] == [[0, 12, 24, 37, 49], [0, 49]]


@both_dtypes
def test_a_perfect_fit_has_no_curvature(dtype: torch.dtype) -> None:
    """The loss is zero, and says nothing of its reduction."""
    model, x = classifier().to(dtype), batch()[0].to(dtype)
    with torch.no_grad():
        y = model(x)
    assert float(empirical_fisher_trace(model, nn.MSELoss(), x, y)) < 1e-10


@pytest.mark.parametrize("kind", ["tuple", "mapping"])
def test_several_inputs(kind: str) -> None:
    problem = BY_NAME[f"use-{kind}_inputs"]
    setting = problem.setting()
    assert isinstance(setting.inputs, tuple if kind == "tuple" else dict)
    expected = total(trace(per_sample_squared_norms(setting.model, nn.MSELoss(), setting.inputs, setting.targets)))
    assert_equal(
        empirical_fisher_trace(setting.model, nn.MSELoss(), setting.inputs, setting.targets), expected, expected
    )


@pytest.mark.parametrize("num_samples", [0, -1, 1.5, True, False, "1", None, torch.tensor(1)])
def test_num_samples_of_the_empirical_trace_is_checked(num_samples: Any) -> None:
    model, (x, y) = classifier(), batch()
    with pytest.raises(CurvatureError, match=r"num_samples") as raised:
        empirical_fisher_trace(model, nn.CrossEntropyLoss(), x, y, num_samples)
    assert isinstance(raised.value, ValueError)


def test_num_samples_of_the_empirical_trace_has_no_effect() -> None:
    model, (x, y) = classifier(), batch()
    values = [empirical_fisher_trace(model, nn.CrossEntropyLoss(), x, y, k) for k in (1, 2, 1000)]
    assert values[0] == values[1] == values[2]


@both_reductions
def test_the_empirical_trace_can_be_differentiated(reduction: str) -> None:
    model, (x, y) = classifier(), batch()
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    parameters = list(model.parameters())
    norms = []
    for n in range(len(x)):
        grads = torch.autograd.grad(loss_fn(model(x[n : n + 1]), y[n : n + 1]), parameters, create_graph=True)
        norms.append(torch.stack([g.square().sum() for g in grads]).sum())
    expected = torch.stack(norms).mean() if reduction == "mean" else torch.stack(norms).sum()
    slopes = torch.autograd.grad(expected, parameters)
    value = empirical_fisher_trace(model, loss_fn, x, y, create_graph=True)
    assert value.requires_grad
    assert_equal(value, expected, expected)
    scale = torch.stack([slope.abs().max() for slope in slopes]).max()
    for mine, theirs in zip(torch.autograd.grad(value, parameters), slopes, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12 * float(scale))


@pytest.mark.parametrize(
    "name",
    [
        "conv-2d-groups",
        "embedding-repeated_ids",
        "norm-layer-3d",
        "tied-embedding_and_head",
        "bilinear-2d",
        "prelu-deep",
        "linear-deep_3d",
    ],
)
def test_the_empirical_trace_of_other_layers_can_be_differentiated(name: str) -> None:
    setting = BY_NAME[name].setting()
    parameters = list(setting.model.parameters())
    loss_fn = nn.MSELoss()
    norms = []
    for n in range(batch_size(setting.inputs)):
        one = (
            setting.inputs[n : n + 1]
            if isinstance(setting.inputs, Tensor)
            else tuple(x[n : n + 1] for x in setting.inputs)
        )
        grads = torch.autograd.grad(
            loss_fn(call(setting.model, one), setting.targets[n : n + 1]), parameters, create_graph=True
        )
        norms.append(torch.stack([g.square().sum() for g in grads]).sum())
    slopes = torch.autograd.grad(torch.stack(norms).mean(), parameters, allow_unused=True)
    value = empirical_fisher_trace(setting.model, loss_fn, setting.inputs, setting.targets, create_graph=True)
    mine = torch.autograd.grad(value, parameters, allow_unused=True)
    scale = max(float(slope.abs().max()) for slope in slopes if slope is not None)
    for a, b, p in zip(mine, slopes, parameters, strict=True):
        a, b = (torch.zeros_like(p) if slope is None else slope for slope in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10 * scale)


# Side effects


class Noisy(nn.Module):
    """Dropout, running statistics, frozen parts, and a gradient that somebody left."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dropout = nn.Conv1d(2, 4, 3), nn.Dropout(0.5)
        self.norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
        self.last = nn.Linear(4, 3)
        self.first.bias.requires_grad_(False)
        self.last.weight.grad = torch.ones_like(self.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(self.norm(self.first(x)).relu().mean(2)))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_the_empirical_trace_leaves_everything_as_it_was(mode: str, create_graph: bool) -> None:
    model = Noisy().train(mode == "train")
    x, y = torch.randn(5, 2, 7), torch.randint(3, (5,))
    before, state_before = state(model), torch.get_rng_state()
    empirical_fisher_trace(model, nn.CrossEntropyLoss(), x, y, create_graph=create_graph)
    assert_unchanged(before, model)
    mine = torch.get_rng_state()
    torch.set_rng_state(state_before)
    model(x)
    assert torch.equal(mine, torch.get_rng_state()), "as after one plain forward"


def test_the_empirical_trace_leaves_everything_as_it_was_after_an_error() -> None:
    model = Noisy().train()
    x, y = torch.full((5, 2, 7), torch.nan), torch.randint(3, (5,))
    before = state(model)
    with pytest.raises(CurvatureError, match=r"not finite"):
        empirical_fisher_trace(model, nn.CrossEntropyLoss(), x, y)
    assert_unchanged(before, model)


def test_dropout_draws_as_a_plain_forward_would() -> None:
    model = Noisy().double().train()
    x, y = torch.randn(5, 2, 7, dtype=torch.float64), torch.randint(3, (5,))
    parameters = [p for p in model.parameters() if p.requires_grad]
    random_state = torch.get_rng_state()
    losses = F.cross_entropy(model(x), y, reduction="none")
    norms = [sum(g.square().sum() for g in torch.autograd.grad(loss, parameters, retain_graph=True)) for loss in losses]
    expected = torch.stack(norms).mean()
    torch.set_rng_state(random_state)
    assert_equal(empirical_fisher_trace(model, nn.CrossEntropyLoss(), x, y), expected, expected)


def test_no_grad_around_the_call_makes_no_difference() -> None:
    model, (x, y) = classifier(), batch()
    value = empirical_fisher_trace(model, nn.CrossEntropyLoss(), x, y)
    with torch.no_grad():
        assert identical(empirical_fisher_trace(model, nn.CrossEntropyLoss(), x, y), value)


def test_inputs_that_require_grad_get_none() -> None:
    model, (x, y) = classifier(), batch()
    value = empirical_fisher_trace(model, nn.CrossEntropyLoss(), x, y)
    x.requires_grad_()
    assert_equal(empirical_fisher_trace(model, nn.CrossEntropyLoss(), x, y), value, value)
    assert x.grad is None


def test_half_precision_models_give_float32() -> None:
    model, x, y = nn.Linear(4, 3).bfloat16(), torch.randn(5, 4).bfloat16(), torch.randn(5, 3).bfloat16()
    value = empirical_fisher_trace(model, nn.MSELoss(), x, y)
    assert value.dtype == torch.float32
    expected = float(total(trace(per_sample_squared_norms(model, nn.MSELoss(), x, y))))
    assert float(value) == pytest.approx(expected, rel=0.05)


# Generalized


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@both_reductions
@both_dtypes
def test_exact_fisher_of_every_loss_type(loss_type: str, reduction: str, dtype: torch.dtype) -> None:
    model, x = classifier().to(dtype), batch()[0].to(dtype)
    expected = total(trace(exact_fisher(model, x, loss_type=loss_type), reduction))
    value = generalized_fisher_trace(model, model(x), None, loss_type, reduction=reduction)
    assert value.shape == ()
    assert value.dtype == dtype
    assert not value.requires_grad
    assert_equal(value, expected, expected)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize(
    "name",
    [
        "conv-1d-circular_stride_groups",
        "norm-group-2d",
        "embedding-one_id",
        "tied-embedding_and_head_one_position",
        "bilinear-2d",
        "reused-linear_three_times",
        "inplace-linear_2d",
        "use-vision_net",
        "frozen-weights",
        "prelu-2d-4",
    ],
)
def test_exact_fisher_through_other_layers(name: str, loss_type: str) -> None:
    setting = BY_NAME[name].setting()
    expected = total(trace(exact_fisher(setting.model, setting.inputs, loss_type=loss_type)))
    outputs = call(setting.model, setting.inputs)
    value = generalized_fisher_trace(setting.model, outputs, None, loss_type, class_axis=class_axis(outputs))
    assert_equal(value, expected, expected)


def class_axis(outputs: Tensor) -> int:
    """That of (samples, classes, positions) has to be told by its other name."""
    return -2 if outputs.dim() == 3 else 1


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_exact_fisher_over_positions_keeps_what_they_share(loss_type: str) -> None:
    model, ids = Transposed(tagger()), torch.randint(7, (3, 5))
    expected = total(trace(exact_fisher(model, ids, loss_type=loss_type)))
    assert_equal(generalized_fisher_trace(model, model(ids), None, loss_type, class_axis=-2), expected, expected)


@pytest.mark.parametrize("class_axis", [2, -1])
def test_the_class_axis(class_axis: int) -> None:
    model, ids = tagger(), torch.randint(7, (3, 5))
    expected = total(trace(exact_fisher(model, ids, class_axis=class_axis)))
    assert_equal(generalized_fisher_trace(model, model(ids), None, class_axis=class_axis), expected, expected)
    assert_equal(expected, total(trace(exact_fisher(Transposed(model), ids))), expected)


def test_class_axis_of_images() -> None:
    model, x = nn.Conv2d(2, 3, 2).double(), torch.randn(2, 2, 3, 3, dtype=torch.float64)
    expected = total(trace(exact_fisher(model, x)))
    assert_equal(generalized_fisher_trace(model, model(x), None), expected, expected)


@pytest.mark.parametrize("ignore_index", [-100, 1])
def test_ignored_positions_contribute_nothing(ignore_index: int) -> None:
    model, ids, y = Transposed(tagger()), torch.randint(7, (4, 5)), torch.randint(3, (4, 5))
    y[0, :3] = y[1] = y[2, 4] = ignore_index
    expected = total(trace(exact_fisher(model, ids, y, ignore_index=ignore_index)))
    assert_equal(generalized_fisher_trace(model, model(ids), y, ignore_index=ignore_index), expected, expected)
    assert float(expected) < 0.9 * float(total(trace(exact_fisher(model, ids))))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_targets_do_not_enter_the_value(loss_type: str) -> None:
    model, (x, y) = classifier(), batch()
    targets = y if loss_type == "nll" else torch.rand(5, 3, dtype=torch.float64)
    assert_equal(
        generalized_fisher_trace(model, model(x), targets, loss_type),
        generalized_fisher_trace(model, model(x), None, loss_type),
        1,
    )


NEGATIVE_LOG_LIKELIHOODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nll": lambda f, y: F.cross_entropy(f, y, reduction="sum"),
    "bce": lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="sum"),
    "mse": lambda f, y: F.mse_loss(f, y, reduction="sum") / 2,
    "poisson": lambda f, y: F.poisson_nll_loss(f, y, reduction="sum"),
}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@both_reductions
def test_observed_labels(loss_type: str, reduction: str) -> None:
    model, (x, y) = classifier(), batch()
    targets = y if loss_type == "nll" else torch.randint(2, (5, 3)).double()
    expected = total(trace(per_sample_squared_norms(model, NEGATIVE_LOG_LIKELIHOODS[loss_type], x, targets), reduction))
    value = generalized_fisher_trace(model, model(x), targets, loss_type, labels="observed", reduction=reduction)
    assert_equal(value, expected, expected)


def test_observed_labels_over_positions_with_ignored_ones() -> None:
    model, ids, y = Transposed(tagger()), torch.randint(7, (4, 5)), torch.randint(3, (4, 5))
    y[0, :3] = y[1] = -100
    expected = total(trace(per_sample_squared_norms(model, NEGATIVE_LOG_LIKELIHOODS["nll"], ids, y)))
    assert_equal(generalized_fisher_trace(model, model(ids), y, labels="observed"), expected, expected)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_observed_labels_need_targets(loss_type: str) -> None:
    model = classifier()
    with pytest.raises(CurvatureError, match=r"targets"):
        generalized_fisher_trace(model, model(batch()[0]), None, loss_type, labels="observed")


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("positions", [False, True])
def test_the_sampled_estimate_is_unbiased(loss_type: str, positions: bool) -> None:
    """In each call every sample stands twenty times, so that its estimate is the mean of as many draws."""
    torch.manual_seed(2)
    if positions:
        model, x = Transposed(tagger()), torch.randint(7, (3, 4)).repeat(20, 1)
    else:
        model, x = classifier(), batch()[0].repeat(20, 1)
    outputs, generator = model(x), torch.Generator().manual_seed(7)
    expected = float(total(trace(exact_fisher(model, x[: len(x) // 20], loss_type=loss_type))))
    axis = class_axis(outputs)
    sample = partial(generalized_fisher_trace, model, outputs, None, loss_type, generator=generator, class_axis=axis)
    draws = torch.stack([sample(1) for _ in range(30)])
    assert float(draws.std()) > 0
    assert abs(float(draws.mean()) - expected) < 4.5 * float(draws.std()) / len(draws) ** 0.5
    many = torch.stack([sample(8) for _ in range(15)])
    assert abs(float(many.mean()) - expected) < 4.5 * float(draws.std()) / (8 * len(many)) ** 0.5
    assert float(many.std()) < float(draws.std()), "more samples, less spread"


def rectifier(classes: int = 10) -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, classes)).double()
    return model, torch.randn(32, 16, dtype=torch.float64)


def spread(model: nn.Module, x: Tensor, k: int, draws: int = 40) -> float:
    generator, outputs = torch.Generator().manual_seed(0), model(x)
    values = [generalized_fisher_trace(model, outputs, None, num_samples=k, generator=generator) for _ in range(draws)]
    return float(torch.stack(values).std())


@pytest.mark.skipif(not hooks_are_seen(), reason="this torch does not show whether the factors may be read")
@pytest.mark.parametrize(("k", "bias"), [(1, False), (3, True)])
def test_the_last_layer_is_looked_through(k: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The spread is about 0.4 times as large, which 40 draws tell to a sixth; it is the same number where nothing is seen."""
    torch.manual_seed(0)
    model, x = rectifier()
    model[4] = nn.Linear(32, 10, bias=bias).double()
    through = spread(model, x, k)
    monkeypatch.setattr(torch_secorder.running.fisher_kind, "last_linear_factors", lambda outputs: None)
    assert through < 0.7 * spread(model, x, k)


def test_both_ways_in_draw_the_same_labels() -> None:
    model, x = rectifier()
    generator = torch.Generator().manual_seed(3)
    value = generalized_fisher_trace(model, model(x), None, num_samples=2, generator=generator)
    generator.manual_seed(3)
    report = fisher_report(model, None, (x, None), fisher="sampled", num_samples=2, generator=generator, progress=False)
    assert_equal(torch.tensor(report["fisher_trace"].sum()), value, value)


@pytest.mark.parametrize("k", [9, 10, 50])
def test_as_many_samples_as_exact_passes_are_exact(k: int) -> None:
    model, x = rectifier()
    expected = generalized_fisher_trace(model, model(x), None)
    assert generalized_fisher_trace(model, model(x), None, num_samples=k) == expected


def test_outputs_of_inputs_that_require_a_gradient() -> None:
    """Also of another model before this one: no warning of a slow way, and no gradient written."""
    model, before, (x, _) = classifier(), nn.Linear(4, 4).double(), batch()
    x.requires_grad_(True)
    for inputs in (x, before(x)):
        expected = total(trace(exact_fisher(model, inputs.detach())))
        assert_equal(generalized_fisher_trace(model, model(inputs), None), expected, expected)
    assert x.grad is None
    assert all(p.grad is None for p in before.parameters())


def test_the_sampled_estimate_leaves_out_ignored_positions() -> None:
    model, ids, y = Transposed(tagger()), torch.randint(7, (4, 5)), torch.full((4, 5), -100)
    y[0, 0] = 1
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [generalized_fisher_trace(model, model(ids), y, num_samples=4, generator=generator) for _ in range(25)]
    )
    expected = float(total(trace(exact_fisher(model, ids, y))))
    assert abs(float(draws.mean()) - expected) <= 4.5 * float(draws.std()) / 5 + 1e-12


def test_a_generator_makes_the_estimate_reproducible() -> None:
    model, x = classifier(), batch()[0]
    before = torch.get_rng_state()
    values = [
        generalized_fisher_trace(model, model(x), None, num_samples=1, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert values[0] == values[1] != values[2]
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("num_samples", [0, -1, 1.5, True, False, "1"])
def test_num_samples_of_the_generalized_trace_is_checked(num_samples: Any) -> None:
    model = classifier()
    with pytest.raises(CurvatureError, match=r"num_samples") as raised:
        generalized_fisher_trace(model, model(batch()[0]), None, num_samples=num_samples)
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize(
    ("loss_type", "positions", "passes"),
    [("nll", False, 3), ("nll", True, 10), ("bce", False, 4), ("mse", True, 15), ("poisson", True, 15)],
)
def test_too_many_passes_are_refused_with_their_number(loss_type: str, positions: bool, passes: int) -> None:
    model, x = (Transposed(tagger()), torch.randint(7, (3, 5))) if positions else (classifier(4), batch()[0])
    axis = class_axis(model(x))
    with pytest.raises(CurvatureError, match=rf"(?s)\b{passes}\b.*num_samples"):
        generalized_fisher_trace(model, model(x), None, loss_type, max_passes=passes - 1, class_axis=axis)
    generalized_fisher_trace(model, model(x), None, loss_type, max_passes=passes, class_axis=axis)
    generalized_fisher_trace(model, model(x), None, loss_type, num_samples=1, max_passes=1, class_axis=axis)


def test_the_default_max_passes() -> None:
    model = nn.Linear(1, 10_002)
    with pytest.raises(CurvatureError, match=r"10,?001"):
        generalized_fisher_trace(model, model(torch.randn(2, 1)), None)


def test_one_class_is_no_classification() -> None:
    model, x = nn.Linear(4, 1), torch.randn(5, 4)
    with pytest.raises(CurvatureError, match='loss_type="mse" for regression'):
        generalized_fisher_trace(model, model(x), None)
    per_sample = x.square().sum(1) + 1  # the outputs' gradient in weight and bias
    assert_equal(generalized_fisher_trace(model, model(x), None, "mse"), per_sample.mean(), per_sample.mean())


def test_a_nearly_certain_class_keeps_its_digits() -> None:
    model = nn.Linear(4, 3)
    x = torch.randn(5, 4)
    with torch.no_grad():
        model.bias += torch.tensor([0.0, 18.0, 0.0])
    expected = total(trace(exact_fisher(model, x)))
    assert 0 < float(expected) < 1e-5
    assert_equal(generalized_fisher_trace(model, model(x), None), expected, expected)


def test_a_certain_class_has_no_curvature() -> None:
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.bias += torch.tensor([0.0, 1e4, 0.0])
    assert float(generalized_fisher_trace(model, model(torch.randn(5, 4)), None)) == 0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_generalized_trace_can_be_differentiated(loss_type: str) -> None:
    """Through the outputs' curvature as well as through the Jacobian."""
    model, x = classifier(), batch()[0]
    parameters = list(model.parameters())
    terms = []
    for n in range(len(x)):
        f = model(x[n : n + 1])[0]
        p = f.softmax(0)
        rate = {"nll": p, "bce": f.sigmoid() * (1 - f.sigmoid()), "mse": torch.ones_like(f), "poisson": f.exp()}[
            loss_type
        ]
        for c in range(len(f)):
            score = f.log_softmax(0)[c] if loss_type == "nll" else f[c]
            grads = torch.autograd.grad(score, parameters, create_graph=True)
            terms.append(rate[c] * torch.stack([g.square().sum() for g in grads]).sum())
    expected = torch.stack(terms).sum() / len(x)
    slopes = torch.autograd.grad(expected, parameters, allow_unused=True)
    value = generalized_fisher_trace(model, model(x), None, loss_type, create_graph=True)
    assert value.requires_grad
    assert_equal(value, expected, expected)
    mine = torch.autograd.grad(value, parameters, allow_unused=True)
    for a, b, p in zip(mine, slopes, parameters, strict=True):
        a, b = (torch.zeros_like(p) if slope is None else slope for slope in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


def test_the_outputs_graph_is_still_the_users() -> None:
    model, (x, y) = classifier(), batch()
    outputs = model(x)
    before = state(model)
    value = generalized_fisher_trace(model, outputs, y)
    assert generalized_fisher_trace(model, outputs, y) == value
    assert_unchanged(before, model)
    F.cross_entropy(outputs, y).backward()
    mine = gradients(model)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    assert all(identical(a, b) for a, b in zip(mine.values(), gradients(model).values(), strict=True))


def test_the_generalized_trace_leaves_everything_as_it_was() -> None:
    model = Noisy().train()
    outputs = model(torch.randn(5, 2, 7))
    before, random_state = state(model), torch.get_rng_state()
    generalized_fisher_trace(model, outputs, None)
    assert_unchanged(before, model)
    assert torch.equal(random_state, torch.get_rng_state())


def test_outputs_without_classes_are_refused() -> None:
    model = nn.Linear(4, 4)
    outputs = model(torch.zeros(2, 0, 4))  # no class for each of 4 positions
    with pytest.raises(CurvatureError, match=r"outputs of shape \(2, 0, 4\)"):
        generalized_fisher_trace(model, outputs, None)


def test_outputs_that_are_not_this_models() -> None:
    model, other, x = classifier(), classifier(), batch()[0]
    for outputs in (other(x), model(x).detach(), torch.randn(5, 3, requires_grad=True)):
        with pytest.raises(CurvatureError, match=r"outputs"):
            generalized_fisher_trace(model, outputs, None)


@pytest.mark.parametrize(
    ("arguments", "message", "kind"),
    [
        ({"loss_type": "hinge"}, r"hinge", NotImplementedError),
        ({"reduction": "average"}, r"reduction", ValueError),
        ({"labels": "predicted"}, r"labels", ValueError),
        ({"class_axis": 0}, r"class_axis", ValueError),
        ({"class_axis": 2}, r"class_axis", ValueError),
        ({"max_passes": 0}, r"max_passes", ValueError),
    ],
    ids=str,
)
def test_bad_arguments_of_the_generalized_trace(arguments: dict[str, Any], message: str, kind: type[Exception]) -> None:
    model = classifier()
    with pytest.raises(CurvatureError, match=message) as raised:
        generalized_fisher_trace(model, model(batch()[0]), None, **arguments)
    assert isinstance(raised.value, kind)


@pytest.mark.parametrize("shape", [(5, 2), (5, 3), (4,)])
def test_targets_of_the_wrong_shape(shape: tuple[int, ...]) -> None:
    model = classifier()
    with pytest.raises(CurvatureError, match=r"(?i)targets"):
        generalized_fisher_trace(model, model(batch()[0]), torch.zeros(shape, dtype=torch.long))


def test_a_linear_model_by_hand() -> None:
    """For a linear layer with squared errors the Gauss-Newton trace is outputs * mean(||x||^2 + 1)."""
    model, x = nn.Linear(4, 3).double(), batch()[0]
    expected = 3 * (x.square().sum(1) + 1).mean()
    assert_equal(generalized_fisher_trace(model, model(x), None, "mse"), expected, expected)


class Turns(nn.Module):
    """Reads its batch on one axis or on the other, through the same kinds of nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.flip = nn.Linear(4, 3), True

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1).contiguous() if self.flip else x
        return self.layer(x).tanh().mean(0 if self.flip else 1)


def test_what_is_remembered_of_a_model_goes_by_its_axes_too() -> None:
    model, x, y = Turns().double(), torch.randn(5, 5, 4).double(), torch.randint(3, (5,))
    expected = total(trace(per_sample_squared_norms(model, F.cross_entropy, x, y)))
    for call_number in range(8):  # the sample is checked in the first calls, and seldom later
        model.flip = call_number < 5
        value = empirical_fisher_trace(model, F.cross_entropy, x, y)
        assert_equal(value, expected, expected)


@pytest.mark.parametrize("half", [lambda n: slice(n // 2, n), lambda n: slice(0, n // 2 + 1)], ids=["last", "first"])
def test_a_loss_that_goes_by_the_places_of_samples_neither_averages_nor_sums(half) -> None:
    model, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.randn(8, 3)

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets, reduction="none").sum(1)[half(len(outputs))].sum()

    with pytest.raises(CurvatureError, match="neither averages nor sums"):
        empirical_fisher_trace(model, loss_fn, x, y)


@both_reductions
def test_a_batch_in_which_every_hinge_is_satisfied_is_the_first(reduction: str) -> None:
    """Its loss is 0, and that of samples given twice, too: other outputs show how the loss combines samples."""
    model, x = nn.Linear(4, 1).double(), torch.randn(6, 4).double()
    signs = model(x).detach()[:, 0].sign()
    combined = torch.mean if reduction == "mean" else torch.sum

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return combined((1 - outputs[:, 0] * targets).relu())

    assert float(empirical_fisher_trace(model, loss_fn, x, 1e6 * signs)) == 0
    table = fisher_report(model, loss_fn, [(x, 1e6 * signs), (x, -signs)], progress=False)
    expected = trace(
        per_sample_squared_norms(model, loss_fn, torch.cat([x, x]), torch.cat([1e6 * signs, -signs])), reduction
    )
    assert table.attrs["reduction"] == reduction
    assert_equal(torch.tensor(table["fisher_trace"].to_numpy()), torch.stack(list(expected.values())), total(expected))


def test_outputs_that_are_zero_say_nothing_of_a_loss_that_averages() -> None:
    model, x = nn.Linear(4, 3).double(), torch.randn(6, 4).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    assert float(empirical_fisher_trace(model, lambda outputs, _: outputs.square().mean(), x, None)) == 0


@both_reductions
def test_a_batch_that_is_masked_as_a_whole_says_nothing_and_may_come_later(reduction: str) -> None:
    """It has samples all the same, whose gradients are 0."""
    model, x, y = nn.Linear(4, 3).double(), torch.randn(6, 4).double(), torch.randn(6, 3).double()
    combined = torch.mean if reduction == "mean" else torch.sum

    def loss_fn(outputs: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        numbers, mask = targets
        return combined((outputs - numbers).square().sum(1) * mask)

    nothing, everything = (x, (y, torch.zeros(6).double())), (x, (y, torch.ones(6).double()))
    with pytest.raises(CurvatureError, match="let another batch come first"):
        fisher_report(model, loss_fn, [nothing, everything], progress=False)
    table = fisher_report(model, loss_fn, [everything, nothing], progress=False)
    expected = trace(per_sample_squared_norms(model, lambda o, t: loss_fn(o, (t, torch.ones(len(t)))), x, y), reduction)
    halved = torch.stack(list(expected.values())) / (2 if reduction == "mean" else 1)
    assert_equal(torch.tensor(table["fisher_trace"].to_numpy()), halved, total(expected))
