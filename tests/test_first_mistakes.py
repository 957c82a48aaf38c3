"""What a first hour's mistakes are told, and that each remedy that is named works."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_secorder
from torch_secorder import (
    FisherMonitor,
    empirical_fisher_trace,
    fisher_report,
    fisher_results,
    generalized_fisher_trace,
    hessian_trace,
    losses,
    pruning,
    quantization,
    testing,
)
from torch_secorder.errors import (
    ArgumentError,
    BroadcastLossWarning,
    CallError,
    CurvatureError,
    LifecycleError,
    ReductionWarning,
    ShapeError,
    UnsupportedError,
)
from torch_secorder.integrations.peft import rank_pattern
from torch_secorder.noise_scale import gradient_noise_scale
from torch_secorder.pruning import Gates, weight_saliency
from torch_secorder.testing import check

N = 6


def regression() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    return model, torch.randn(N, 4, dtype=torch.float64), torch.randn(N, dtype=torch.float64)


def classification() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3)).double(), torch.randn(N, 4, dtype=torch.float64), torch.randint(3, (N,))


def loop(model: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: nn.Module) -> float:
    """The trace by plain autograd, one sample after the other."""
    squares = 0.0
    for x, y in zip(inputs.split(1), targets.split(1), strict=True):
        squares += sum(
            float(g.square().sum()) for g in torch.autograd.grad(loss_fn(model(x), y), list(model.parameters()))
        )
    return squares / len(inputs)


def total(*arguments, **options) -> float:
    return float(fisher_report(*arguments, progress=False, **options)["fisher_trace"].sum())


# A loss that broadcasts


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize(
    "loss_fn",
    [nn.MSELoss(), nn.L1Loss(), nn.HuberLoss(), lambda f, y: ((f - y) ** 2).mean()],
    ids=["MSELoss", "L1Loss", "HuberLoss", "by hand"],
)
def test_a_loss_that_compares_every_output_with_every_target_is_refused(loss_fn) -> None:
    model, x, y = regression()
    for call in (empirical_fisher_trace, lambda m, loss, a, b: total(m, loss, (a, b))):
        with pytest.raises(ShapeError, match=r"\(6, 1\) and targets of shape \(6,\).*targets.unsqueeze\(-1\)"):
            call(model, loss_fn, x, y)
        with pytest.raises(ShapeError, match=r"\(6,\) and targets of shape \(6, 1\).*pass targets.squeeze\(-1\)"):
            call(nn.Sequential(model, nn.Flatten(0)), loss_fn, x, y.unsqueeze(-1))
    assert total(model, loss_fn, (x, y.unsqueeze(-1))) == pytest.approx(
        loop(model, x, y.unsqueeze(-1), loss_fn), rel=1e-8
    )
    squeezed = nn.Sequential(model, nn.Flatten(0))
    assert total(squeezed, loss_fn, (x, y)) == pytest.approx(loop(squeezed, x, y, loss_fn), rel=1e-8)


@pytest.mark.parametrize("constant", [False, True])
def test_a_loss_that_squeezes_by_itself_is_none(constant: bool) -> None:
    model, x, y = regression()
    y = torch.ones_like(y) if constant else y

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs.squeeze(-1), targets)

    assert total(model, loss_fn, (x, y)) == pytest.approx(loop(model, x, y, loss_fn), rel=1e-8)


def test_a_loss_without_targets_is_none() -> None:
    model, x, y = regression()

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.softplus(-outputs).mean()

    assert total(model, loss_fn, (x, y)) == pytest.approx(loop(model, x, y, loss_fn), rel=1e-8)


# In a monitor, which does not see the loss


def many(n: int) -> tuple[nn.Module, Tensor, Tensor]:
    return regression()[0], torch.randn(n, 4, dtype=torch.float64), 3 + torch.randn(n, dtype=torch.float64)


def by_hand(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets) ** 2).mean()


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - 3) ** 2 * targets).mean()


# A loss, and the node between it and the model's outputs that makes (n, n) of (n, 1). Those losses of torch whose node has no
# gradient for a broadcast input (MSE, Huber, SmoothL1), and the L1 loss with them, expand both arguments to one shape first.
BROADCASTING = {
    "MSELoss": (nn.MSELoss(), "ExpandBackward0"),
    "L1Loss": (nn.L1Loss(), "ExpandBackward0"),
    "HuberLoss": (nn.HuberLoss(), "ExpandBackward0"),
    "SmoothL1Loss": (nn.SmoothL1Loss(), "ExpandBackward0"),
    "PoissonNLLLoss": (nn.PoissonNLLLoss(), "MulBackward0"),
    "a sum": (nn.HuberLoss(reduction="sum"), "ExpandBackward0"),
    "squares by hand": (by_hand, "SubBackward0"),
    "absolute values by hand": (lambda f, y: (y - f).abs().mean(), "SubBackward0"),
    "a factor": (lambda f, y: 1e4 * by_hand(f, y), "SubBackward0"),
    "weights": (weighted, "MulBackward0"),
    "after other operations": (lambda f, y: F.mse_loss(2 * f.view(-1, 1).tanh(), y), "ExpandBackward0"),
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("loss_fn", "node"), BROADCASTING.values(), ids=BROADCASTING)
def test_a_monitor_warns_of_a_loss_that_broadcasts(loss_fn, node: str, dtype: torch.dtype) -> None:
    reduction = getattr(loss_fn, "reduction", "mean")
    words = r"\({0}, 1\) to \({0}, {0}\) \(in {1}\).*shape \({0},\) cause that: pass targets.unsqueeze"
    for n in (2, N, 50):
        model, x, y = (value.to(dtype) for value in many(n))
        with FisherMonitor(model, reduction) as monitor:
            with pytest.warns(BroadcastLossWarning, match=words.format(n, node)) as told:
                loss_fn(model(x), y).backward()
            assert __file__ in [one.filename for one in told if one.category is BroadcastLossWarning]
            assert monitor.n_samples == n
    with FisherMonitor(model, reduction) as monitor, warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_fn(model(x), y.unsqueeze(-1)).backward()
    exact = loop(model, x, y.unsqueeze(-1), loss_fn) * (n if reduction == "sum" else 1)
    assert float(monitor.trace) == pytest.approx(exact, rel=1e-4 if dtype == torch.float32 else 1e-8)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("squeezed", ["by the model", "by the loss"])
@pytest.mark.parametrize("loss_fn", [nn.MSELoss(), nn.L1Loss(), by_hand], ids=["MSELoss", "L1Loss", "by hand"])
def test_a_monitor_warns_of_targets_that_have_an_axis_more(loss_fn, squeezed: str) -> None:
    model, x, y = regression()
    flat = nn.Sequential(model, nn.Flatten(0))
    watched, outputs = (flat, flat) if squeezed == "by the model" else (model, lambda x: model(x).squeeze(-1))
    words = r"\(6,\) to \(6, 6\) .*shape \(6, 1\) cause that: pass targets.squeeze\(-1\)"
    with FisherMonitor(watched), pytest.warns(BroadcastLossWarning, match=words):
        loss_fn(outputs(x), y.unsqueeze(-1)).backward()
    with FisherMonitor(watched) as monitor:
        loss_fn(outputs(x), y).backward()
    assert float(monitor.trace) == pytest.approx(loop(flat, x, y, loss_fn), rel=1e-8)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("begin", [torch.autograd.backward, lambda loss: loss.backward(), "grad", "edge", "several"])
def test_every_way_to_begin_a_backward_pass_shows_the_loss(begin) -> None:
    model, x, y = regression()
    with FisherMonitor(model), pytest.warns(BroadcastLossWarning):
        loss = F.l1_loss(model(x), y)
        if begin == "grad":
            torch.autograd.grad(loss, list(model.parameters()))
        elif begin == "edge":
            torch.autograd.backward(torch.autograd.graph.get_gradient_edge(loss), torch.ones_like(loss))
        elif begin == "several":
            torch.autograd.backward([torch.zeros((), requires_grad=True) * 2, loss])
        else:
            begin(loss)


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_block_warns_once() -> None:
    model, x, y = regression()
    with FisherMonitor(model), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            F.l1_loss(model(x), y).backward()
    assert [one.category for one in told].count(BroadcastLossWarning) == 1


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_each_loss_at_one_line_is_looked_at() -> None:
    model, x, y = regression()
    with FisherMonitor(model), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            F.l1_loss(model(x), y.unsqueeze(-1)).backward()
        assert not told
        F.l1_loss(model(x), y).backward()
    assert [one.category for one in told].count(BroadcastLossWarning) == 1


def test_where_warnings_are_errors_the_gradients_are_complete() -> None:
    model, x, y = regression()
    with FisherMonitor(model) as monitor, warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BroadcastLossWarning):
            by_hand(model(x), y).backward()
    found = [p.grad for p in model.parameters()]
    assert monitor.n_samples == 0
    expected = torch.autograd.grad(by_hand(model(x), y), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def quantiles(outputs: Tensor, targets: Tensor) -> Tensor:
    """A pinball loss at five levels, whose tensors are ``[n, 5]``."""
    error = targets.unsqueeze(-1) - outputs
    levels = torch.linspace(0.1, 0.9, 5, dtype=outputs.dtype)
    return torch.maximum(levels * error, (levels - 1) * error).mean()


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda f, y: f.square().mean(),
        lambda f, y: F.softplus(-f).mean(),
        lambda f, y: f.mean(),
        lambda f, y: F.mse_loss(f.squeeze(-1), y),
        lambda f, y: F.mse_loss(f, torch.full_like(f, 2)),
        lambda f, y: F.huber_loss(f.flatten(), torch.full_like(y, 2)),
        lambda f, y: F.binary_cross_entropy_with_logits(f.squeeze(-1), y.sigmoid()),
        lambda f, y: (f.exp() - f).mean(),
        quantiles,
    ],
    ids=["no target", "logistic", "linear", "squeezed", "equal", "equal, Huber", "logits", "rates", "quantiles"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [N, 500])
def test_other_losses_of_one_output_are_not_warned_of(loss_fn, n: int, dtype: torch.dtype) -> None:
    model, x, y = (value.to(dtype) for value in many(n))
    with FisherMonitor(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_fn(model(x), y).backward()


CLASSES, NUMBERS = torch.arange(N) % 3, torch.linspace(0.1, 0.9, N, dtype=torch.float64)[:, None]
REDUCED = {  # losses of torch, with a model and targets for each
    "cross_entropy": (F.cross_entropy, classification, CLASSES),
    "cross_entropy of positions": (
        lambda f, y, reduction: F.cross_entropy(f[..., None], y, reduction=reduction),
        *(classification, CLASSES[:, None]),
    ),
    "mse_loss": (F.mse_loss, regression, NUMBERS),
    "smooth_l1_loss": (F.smooth_l1_loss, regression, NUMBERS),
    "huber_loss": (F.huber_loss, regression, NUMBERS),
    "binary_cross_entropy_with_logits": (F.binary_cross_entropy_with_logits, regression, NUMBERS),
    "binary_cross_entropy": (
        lambda f, y, reduction: F.binary_cross_entropy(f.sigmoid(), y, reduction=reduction),
        *(regression, NUMBERS),
    ),
}
SAID = {
    "mean": f'sums over its {N} samples, but the monitor has reduction="mean", which makes its traces {N * N} times too large',
    "sum": f'averages over its {N} samples, but the monitor has reduction="sum"',
}


@pytest.mark.parametrize(("told", "other"), [("mean", "sum"), ("sum", "mean")])
@pytest.mark.parametrize(("loss_fn", "problem", "y"), REDUCED.values(), ids=REDUCED)
def test_a_monitor_warns_once_of_another_reduction_than_it_was_told(loss_fn, problem, y, told: str, other: str) -> None:
    model, x, _ = problem()
    with FisherMonitor(model, told), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(3):
            loss_fn(model(x), y, reduction=other).backward()
    (one,) = [w for w in warned if w.category is ReductionWarning]
    assert SAID[told] in str(one.message)
    assert one.filename == __file__
    # The remedy, and what is meant to be: the numbers are the loop's.
    with FisherMonitor(model, other) as monitor:
        loss_fn(model(x), y, reduction=other).backward()
    exact = loop(model, x, y, lambda f, t: loss_fn(f, t, reduction=other)) * (N if other == "sum" else 1)
    assert float(monitor.trace) == pytest.approx(exact, rel=1e-8)


@pytest.mark.parametrize(
    ("loss_of", "options"),
    [
        (lambda f, y: F.cross_entropy(f, y, reduction="sum") / len(y), {}),
        (lambda f, y: F.cross_entropy(f, y, reduction="sum"), {"loss_scale": N}),
        (lambda f, y: F.cross_entropy(f, y, reduction="sum"), {"loss_scale": lambda: N}),
    ],
    ids=["divided", "scaled", "scaled by a function"],
)
def test_a_sum_that_is_divided_is_not_warned_of(loss_of, options: dict[str, object]) -> None:
    model, x, y = classification()
    with FisherMonitor(model, **options):
        loss_of(model(x), y).backward()
    with FisherMonitor(model):
        F.cross_entropy(model(x[:1]), y[:1], reduction="sum").backward()


# The wrong likelihood


def test_one_output_under_nll_names_the_likelihoods_of_one_output() -> None:
    model, x, _ = regression()
    with pytest.raises(CurvatureError, match='"mse" for regression, loss_type="bce" for one logit'):
        total(model, None, (x, None), fisher="exact")
    per_sample = loop(model, x, torch.zeros(N), lambda f, y: f.sum())
    assert total(model, None, (x, None), fisher="exact", loss_type="mse") == pytest.approx(per_sample, rel=1e-8)


@pytest.mark.parametrize(
    ("loss_fn", "own"),
    [(nn.MSELoss(), "mse"), (F.mse_loss, "mse"), (nn.BCEWithLogitsLoss(), "bce")],
    ids=["MSELoss", "mse_loss", "BCEWithLogitsLoss"],
)
def test_a_loss_that_contradicts_the_likelihood_is_refused(loss_fn, own: str) -> None:
    model, x, _ = classification()
    data = (x, torch.rand(N, 3, dtype=torch.float64))
    with pytest.raises(ArgumentError, match=f'pass loss_type="{own}", or loss_fn=None'):
        total(model, loss_fn, data, fisher="exact")
    assert total(model, loss_fn, data, fisher="exact", loss_type=own) == total(
        model, None, data, fisher="exact", loss_type=own
    )


def test_targets_that_are_no_classes_name_the_other_likelihoods() -> None:
    model, x, _ = classification()
    with pytest.raises(
        ShapeError, match=r'"mse" for regression, loss_type="bce" for independent labels, or.* no targets'
    ):
        generalized_fisher_trace(model, model(x), torch.rand(N, 3))
    assert float(generalized_fisher_trace(model, model(x), None)) > 0


@pytest.mark.parametrize(("said", "meant"), [("ce", "nll"), ("cross_entropy", "nll"), ("binary", "bce"), ("l2", "mse")])
def test_another_name_of_a_likelihood_is_understood_and_refused(said: str, meant: str) -> None:
    model, x, _ = classification()
    with pytest.raises(UnsupportedError, match=f"'{said}' is \"{meant}\" here"):
        total(model, None, (x, None), fisher="exact", loss_type=said)


@pytest.mark.parametrize(
    ("last", "loss_type"), [(torch.sigmoid, "bce"), (torch.exp, "poisson")], ids=["bce", "poisson"]
)
def test_a_model_that_returns_what_a_loss_type_makes_of_outputs_is_warned_of(last, loss_type: str) -> None:
    model, x, _ = classification()

    class Ended(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, x: Tensor) -> Tensor:
            return last(self.body(x))

    ended = Ended()
    for call in (
        lambda: generalized_fisher_trace(ended, ended(x), None, loss_type),
        lambda: total(ended, None, (x, None), fisher="exact", loss_type=loss_type),
    ):
        with pytest.warns(UserWarning, match=f"ends in {last.__name__}, .*return the lo") as told:
            call()
        assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert total(model, None, (x, None), fisher="exact", loss_type=loss_type) == pytest.approx(
            float(generalized_fisher_trace(model, model(x), None, loss_type)), rel=1e-8
        )


def test_a_model_that_ends_in_a_softmax_is_warned_of() -> None:
    model, x, y = classification()
    probabilities = nn.Sequential(model, nn.Softmax(1))
    for call in (
        lambda: generalized_fisher_trace(probabilities, probabilities(x), y),
        lambda: total(probabilities, None, (x, None), fisher="exact"),
    ):
        with pytest.warns(UserWarning, match="ends in softmax, .*return the logits") as told:
            call()
        assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logarithms = nn.Sequential(model, nn.LogSoftmax(1))
        assert float(generalized_fisher_trace(logarithms, logarithms(x), y)) == pytest.approx(
            float(generalized_fisher_trace(model, model(x), y)), rel=1e-8
        )


# Arguments in the wrong place


def test_the_class_of_a_loss_is_no_loss() -> None:
    model, x, y = classification()
    for call in (
        lambda loss: empirical_fisher_trace(model, loss, x, y),
        lambda loss: hessian_trace(model, loss, x, y),
        lambda loss: total(model, loss, (x, y)),
        lambda loss: total(model, loss, (x, y), fisher="exact"),
    ):
        with pytest.raises(
            ArgumentError, match=r"the class CrossEntropyLoss: pass an instance of it, CrossEntropyLoss\(\)"
        ):
            call(nn.CrossEntropyLoss)
        call(nn.CrossEntropyLoss())


def test_model_and_loss_in_each_others_place() -> None:
    model, x, y = classification()
    for call in (
        lambda *both: empirical_fisher_trace(*both, x, y),
        lambda *both: hessian_trace(*both, x, y),
        lambda *both: total(*both, (x, y)),
    ):
        with pytest.raises(ArgumentError, match=r"CrossEntropyLoss without parameters.*pass the model first"):
            call(nn.CrossEntropyLoss(), model)
        with pytest.raises(
            ArgumentError, match=r"model must be a torch.nn.Module.*Sequential with.*pass the model first"
        ):
            call(F.cross_entropy, model)
        with pytest.raises(ArgumentError, match=r"model must be a torch.nn.Module"):
            call(lambda x: x, nn.CrossEntropyLoss())
        call(model, nn.CrossEntropyLoss())


def test_too_many_passes_name_what_then_works() -> None:
    model = nn.Linear(4, 30)
    with pytest.raises(ArgumentError, match=r'num_samples=k .*to fisher_report together with fisher="sampled"'):
        total(model, None, (torch.randn(N, 4), None), fisher="exact", max_passes=10)
    assert total(model, None, (torch.randn(N, 4), None), fisher="sampled", num_samples=10, max_passes=10) > 0


# Calls that don't fit

LOSS, DATA = nn.CrossEntropyLoss(), [(torch.zeros(N, 4, dtype=torch.float64), torch.zeros(N, dtype=torch.int64))]

# What is called, and what it is told to do instead. m is the model, x and y a batch.
CALLS: dict[str, tuple[Callable[..., object], str]] = {
    "fisher_report(m, loss, x, y)": (
        lambda m, x, y: fisher_report(m, LOSS, x, y),
        r"too many positional arguments: write fisher_report\(model, loss_fn, data\), where data is a loader or one pair",
    ),
    "fisher_report(m, data)": (
        lambda m, x, y: fisher_report(m, DATA),
        r"'data': write fisher_report\(model, loss_fn, data\)",
    ),
    "fisher_report(m, data, loss)": (
        lambda m, x, y: fisher_report(m, DATA, LOSS),
        r"type list, which seems to be data: the loss function comes before it, as in \(model, loss_fn, data\)",
    ),
    "fisher_report(fischer=)": (
        lambda m, x, y: fisher_report(m, LOSS, DATA, fischer="exact"),
        r"do you mean fisher=\?",
    ),
    "fisher_report(diagonal=)": (lambda m, x, y: fisher_report(m, LOSS, DATA, diagonal=True), r"use fisher_results"),
    "fisher_results(m, loss, x, y)": (lambda m, x, y: fisher_results(m, LOSS, x, y), r"write fisher_results\(model, "),
    "fisher_results(num_sample=)": (
        lambda m, x, y: fisher_results(m, LOSS, DATA, num_sample=1),
        r"mean num_samples=\?",
    ),
    "fisher_results(by=)": (
        lambda m, x, y: fisher_results(m, LOSS, DATA, by="type"),
        r"fisher_results\(.*\)\.report\(by=",
    ),
    "empirical_fisher_trace(m, x, y)": (
        lambda m, x, y: empirical_fisher_trace(m, x, y),
        r"'targets': write empirical_fisher_trace\(model, loss_fn, inputs, targets\) for one batch, or fisher_report\(",
    ),
    "empirical_fisher_trace(m, x, y, loss)": (
        lambda m, x, y: empirical_fisher_trace(m, x, y, LOSS),
        r"not a tensor of shape \(6, 4\), which seems to be data: the loss function comes before it",
    ),
    "empirical_fisher_trace(m, loss of a batch, x, y)": (
        lambda m, x, y: empirical_fisher_trace(m, LOSS(m(x), y), x, y),
        r"which seems to be a loss that was computed already: pass the function that computes it",
    ),
    "empirical_fisher_trace(m, loss, y, x)": (
        lambda m, x, y: empirical_fisher_trace(m, LOSS, y, x),
        r"inputs of shape \(6,\) and torch.int64 with targets of shape \(6, 4\) and torch.float64, which seem to have changed",
    ),
    "empirical_fisher_trace(m, loss, outputs, y)": (
        lambda m, x, y: empirical_fisher_trace(m, LOSS, m(x), y),
        r"inputs of shape \(6, 3\), which were computed from parameters: if they are its outputs, pass what the model takes",
    ),
    "empirical_fisher_trace(reduction=)": (
        lambda m, x, y: empirical_fisher_trace(m, LOSS, x, y, reduction="sum"),
        r"leave it out, since whether the loss averages or sums is found out",
    ),
    "fisher_report(m, loss, (y, x))": (lambda m, x, y: total(m, LOSS, (y, x)), r"seem to have changed places"),
    "generalized_fisher_trace(m, outputs)": (
        lambda m, x, y: generalized_fisher_trace(m, m(x)),
        r"'targets': write generalized_fisher_trace\(model, model\(inputs\), targets\), where targets may be None",
    ),
    "generalized_fisher_trace(m, y, outputs)": (
        lambda m, x, y: generalized_fisher_trace(m, y, m(x)),
        r"changed places, pass \(model, model\(inputs\), targets\)",
    ),
    "generalized_fisher_trace(m, x, y)": (
        lambda m, x, y: generalized_fisher_trace(m, x, y),
        r"and pass these, not the inputs",
    ),
    "generalized_fisher_trace(loss_fn=)": (
        lambda m, x, y: generalized_fisher_trace(m, m(x), y, loss_fn=LOSS),
        r"say which likelihood it is, with loss_type=",
    ),
    "hessian_trace(m, x, y)": (
        lambda m, x, y: hessian_trace(m, x, y),
        r"write hessian_trace\(model, loss_fn, inputs, targets\)",
    ),
    "hessian_trace(m, loss, y, x)": (lambda m, x, y: hessian_trace(m, LOSS, y, x), r"seem to have changed places"),
    "FisherMonitor()": (lambda m, x, y: FisherMonitor(), r"'model': write with FisherMonitor\(model\) as monitor"),
    "FisherMonitor(m, loss)": (
        lambda m, x, y: FisherMonitor(m, LOSS),
        r"reduction, the second argument, .* not CrossEntropyLoss\(\): a monitor takes no loss and no data, but watches",
    ),
    "FisherMonitor(m, data)": (
        lambda m, x, y: FisherMonitor(m, DATA),
        r"a monitor takes no loss and no data, but watches",
    ),
    "FisherMonitor(loss_fn=)": (lambda m, x, y: FisherMonitor(m, loss_fn=LOSS), r"a monitor takes no loss and no data"),
    "FisherMonitor(diag=)": (lambda m, x, y: FisherMonitor(m, diag=True), r"do you mean diagonal=\?"),
    "FisherMonitor(m, 'sum', True)": (
        lambda m, x, y: FisherMonitor(m, "sum", True),
        r"but model and reduction go by name",
    ),
    "FisherMonitor(parameters)": (
        lambda m, x, y: FisherMonitor(m.parameters()),
        r"pass the model itself, and say with parameters= which of its parameters count",
    ),
    "FisherMonitor(optimizer)": (
        lambda m, x, y: FisherMonitor(torch.optim.SGD(m.parameters())),
        r"not an object of the type SGD: pass the model itself",
    ),
    "FisherMonitor(class)": (
        lambda m, x, y: FisherMonitor(nn.Linear),
        r"the class Linear: pass an instance of it, Linear\(",
    ),
    "Gates()": (lambda m, x, y: Gates(), r"'model': write Gates\(model\)"),
    "Gates(m, loss)": (lambda m, x, y: Gates(m, LOSS), r"can't be a CrossEntropyLoss: gates take no loss, but watch"),
    "check(m, loss, x, y)": (
        lambda m, x, y: check(m, LOSS, x, y),
        r"write check\(model, loss_fn, batch\), where batch is one pair",
    ),
    "check(fischer=)": (lambda m, x, y: check(m, LOSS, (x, y), fischer="exact"), r"do you mean fisher=\?"),
    "gradient_noise_scale(m, loss, data)": (
        lambda m, x, y: gradient_noise_scale(m, LOSS, DATA),
        r"write gradient_noise_scale\(monitor.report\(\)\)",
    ),
    "weight_saliency(report, m)": (
        lambda m, x, y: weight_saliency(fisher_report(m, LOSS, DATA, progress=False), m),
        r"the model comes first, and then the monitor, results or report",
    ),
}


@pytest.mark.parametrize(("call", "instead"), CALLS.values(), ids=CALLS)
def test_a_call_that_does_not_fit_is_told_how_to_write_it(call: Callable[..., object], instead: str) -> None:
    with pytest.raises(CurvatureError, match=instead) as told:
        call(*classification())
    assert isinstance(told.value, TypeError) == isinstance(told.value, CallError)
    assert len(str(told.value)) < 400


def public_functions() -> dict[str, Callable[..., object]]:
    """Those that take something, by name; what users get and do not make is none of them."""
    homes = (torch_secorder, quantization, pruning, testing, losses)
    found = {name: getattr(home, name) for home in homes for name in home.__all__}
    found |= {"rank_pattern": rank_pattern, "gradient_noise_scale": gradient_noise_scale}
    del found["GateSaliency"]
    return {name: one for name, one in found.items() if callable(one) and takes_something(one)}


def takes_something(function: Callable[..., object]) -> bool:
    taken = inspect.signature(function).parameters.values()
    return any(p.default is p.empty and p.kind is not p.VAR_POSITIONAL for p in taken)


PUBLIC = public_functions()


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_function_that_is_called_without_anything_says_how_to_call_it(name: str) -> None:
    assert len(PUBLIC) > 15
    with pytest.raises(CallError, match=rf"^{name}: missing a required argument: '\w+': write .*{name}\("):
        PUBLIC[name]()


def test_functions_that_explain_their_calls_look_like_themselves() -> None:
    for one in (fisher_report, fisher_results, empirical_fisher_trace, generalized_fisher_trace, hessian_trace, check):
        assert next(iter(inspect.signature(one).parameters)) == "model"
        assert (one.__doc__ or "").count("Args:") == 1
    assert list(inspect.signature(FisherMonitor).parameters)[:2] == ["model", "reduction"]


def test_an_error_of_a_model_whose_arguments_are_in_their_places_stays_its_own() -> None:
    model, x, y = classification()
    with pytest.raises(RuntimeError, match="cannot be multiplied") as told:
        empirical_fisher_trace(model, LOSS, x[:, :2], y)
    assert not isinstance(told.value, CurvatureError)


# No sample was seen

Step = Callable[[nn.Module, Tensor, Tensor], object]


def trained(model: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(model(x), y).backward()


def copied(model: nn.Module, x: Tensor, y: Tensor) -> None:
    trained(copy.deepcopy(model), x, y)


def only_forward(model: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(model(x), y)
    model(x)


def detached(model: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(model(x).detach().requires_grad_(), y).backward()


def evaluated(model: nn.Module, x: Tensor, y: Tensor) -> None:
    for block in (torch.no_grad, torch.inference_mode):
        with block():
            F.cross_entropy(model(x), y)


def of_inputs(model: nn.Module, x: Tensor, y: Tensor) -> None:
    x = x.clone().requires_grad_()
    torch.autograd.grad(F.cross_entropy(model(x), y), x)


def refused(model: nn.Module, x: Tensor, y: Tensor) -> None:
    with pytest.raises(CurvatureError, match="finite"):
        (F.cross_entropy(model(x), y) * torch.inf).backward()


UNSEEN = {
    copied: r"no call of this Sequential was completed inside it; if a copy .* watch the module that is called",
    only_forward: r"the forward of Sequential ran 2 times, but no backward pass reached its outputs: call loss.backward\(\)",
    detached: r"ran 1 time, but no backward pass reached its outputs: .* without detach\(\)",
    evaluated: r"ran 2 times, but no output of it can be differentiated: call the model outside of torch.no_grad\(\)",
    of_inputs: r"ran 1 time, and 1 backward pass computed no gradient of an analyzed parameter.* call backward\(\)",
    refused: r"1 backward pass was refused, the last because: .*finite",
}


# Gates take every pass that reaches a leaf, and any number.
PAIRS = [(make, step) for step in (*UNSEEN, None) for make in (FisherMonitor, Gates)]
PAIRS = [(make, step) for make, step in PAIRS if make is FisherMonitor or step not in (of_inputs, refused)]


@pytest.mark.parametrize(("make", "step"), PAIRS)
def test_a_block_without_samples_says_what_it_saw(make: type[FisherMonitor | Gates], step: Step | None) -> None:
    model, x, y = classification()
    said = "the block was never entered: call the model, and backward" if step is None else UNSEEN[step]
    monitor = make(model)
    if step is not None:
        with monitor:
            step(model, x, y)
    with pytest.raises(LifecycleError, match=f"no sample was seen yet: .*{said}"):
        _ = monitor.trace if isinstance(monitor, FisherMonitor) else monitor.fisher
    with monitor:
        trained(model, x, y)
    assert monitor.n_samples == N
    if isinstance(monitor, FisherMonitor):
        assert float(monitor.trace) == pytest.approx(loop(model, x, y, nn.CrossEntropyLoss()), rel=1e-8)


def test_backward_after_the_block_is_told_as_such() -> None:
    model, x, y = classification()
    with FisherMonitor(model) as monitor:
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    with pytest.raises(
        LifecycleError, match=r"ran 1 time, but backward came after the block had ended: call .* inside"
    ):
        monitor.report()


def test_the_copy_that_is_called_is_the_one_to_watch() -> None:
    model, x, y = classification()
    called = copy.deepcopy(model)
    with FisherMonitor(called) as monitor:
        trained(called, x, y)
    assert float(monitor.trace) == pytest.approx(loop(model, x, y, nn.CrossEntropyLoss()), rel=1e-8)


def test_what_was_seen_counts_from_the_reset_on() -> None:
    model, x, y = classification()
    with FisherMonitor(model, every=2) as monitor:
        trained(model, x, y)
        monitor.reset()
        with pytest.raises(LifecycleError, match=r"no call of this Sequential was completed inside it since reset\(\)"):
            monitor.report()
        for _ in range(2):
            model(x)
        with pytest.raises(
            LifecycleError, match=r"ran 1 time since reset\(\) \(without the calls that every=2 passes over\)"
        ):
            monitor.report()


def test_samples_that_were_skipped_are_told() -> None:
    model, x, y = classification()
    with FisherMonitor(model, nonfinite="skip") as monitor:
        trained(model, x * torch.nan, y)
    with pytest.raises(LifecycleError, match=r'nonfinite="skip" left out all 6 samples, .* learning rate'):
        monitor.report()


def test_what_verify_cannot_see_is_off_by_what_the_questions_page_says() -> None:
    """A sum in a mean's monitor is N^2 off the mean's number and N off the sum's; a third of the loss is a ninth."""
    model, x, y = classification()
    mean = loop(model, x, y, nn.CrossEntropyLoss())

    def watched(loss_of: Callable[[Tensor], Tensor]) -> float:
        with FisherMonitor(model) as monitor:
            outputs = model(x)
            loss = loss_of(outputs)
            monitor.verify(loss)
            loss.backward()
        return float(monitor.trace)

    with pytest.warns(ReductionWarning):
        summed = watched(lambda outputs: F.cross_entropy(outputs, y, reduction="sum"))
    assert summed == pytest.approx(N**2 * mean, rel=1e-8)
    assert summed == pytest.approx(N * total(model, nn.CrossEntropyLoss(reduction="sum"), (x, y)), rel=1e-8)
    assert watched(lambda outputs: F.cross_entropy(outputs, y) / 3) == pytest.approx(mean / 9, rel=1e-8)


def test_results_of_a_replaced_model_are_merged() -> None:
    first, x, y = classification()
    second = copy.deepcopy(first)
    old, new = FisherMonitor(first), FisherMonitor(second)
    for monitor, model in ((old, first), (new, second)):
        with monitor:
            F.cross_entropy(model(x), y).backward()
    new.merge(old)
    assert new.n_samples == 2 * N
    assert float(new.trace) == pytest.approx(loop(first, x, y, nn.CrossEntropyLoss()), rel=1e-8)
