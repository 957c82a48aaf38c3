"""Every public function under shapes, dtypes and nonsense that hypothesis thinks of: a right number or a CurvatureError.

What plain PyTorch refuses (a model and a loss that don't fit the data) may be refused in PyTorch's own words.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model_state import assert_unchanged, hooks, state
from oracles import assert_equal, exact_fisher, per_sample_squared_norms
from torch_secorder import (
    FisherMonitor,
    empirical_fisher_trace,
    fisher_report,
    generalized_fisher_trace,
    hessian_trace,
    register_rule,
)
from torch_secorder.errors import CurvatureError, SlowFallbackWarning

fuzz = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][:, -1]


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids)).mean(1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 4),
    "mlp": lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.LayerNorm(3), nn.Linear(3, 4)),
    "flat": lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 3)),
    "conv": lambda: nn.Sequential(nn.Conv1d(4, 3, 1), nn.ReLU(), nn.Conv1d(3, 2, 2, padding=1)),
    "recurrent": Recurrent,
    "embedding": Bag,
    "attention": Attention,
    "dropout": lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval(),
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval(),
    "tuple": lambda: Several(),
}


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.one(x), x


def summed(outputs: Any, targets: Any) -> Tensor:
    return outputs.square().sum() + 0 * (0 if targets is None else targets.sum())


LOSSES: dict[str, Callable[[Any, Any], Any]] = {
    "mse": nn.MSELoss(),
    "ce": nn.CrossEntropyLoss(),
    "ce sum": nn.CrossEntropyLoss(reduction="sum"),
    "bce": nn.BCEWithLogitsLoss(),
    "none": nn.CrossEntropyLoss(reduction="none"),
    "first": lambda outputs, targets: outputs[0].sum(),
    "spread": lambda outputs, targets: outputs.var(),
    "number": lambda outputs, targets: 1.0,
    "summed": summed,
}
shapes = st.one_of(
    st.tuples(st.integers(0, 5), st.just(4)),
    st.tuples(st.integers(1, 5), st.integers(1, 4), st.just(4)),
    st.tuples(st.integers(1, 4), st.just(4), st.integers(1, 4)),
    st.lists(st.integers(0, 4), max_size=4).map(tuple),
)
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float64,
    torch.float32,
    torch.int64,
    torch.bfloat16,
    torch.complex64,
    torch.bool,
]
dtypes = st.sampled_from(DTYPES)
nonsense = st.one_of(
    *(st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=3)),
    st.sampled_from(
        [math.nan, (), [], {}, {"x": 1}, object(), len, int, torch.float32, torch.empty(0), torch.zeros(2, 2)]
    ),
)


@st.composite
def numbers(draw: Any, shape: Any = shapes) -> Tensor:
    dtype, size = draw(dtypes), draw(shape)
    if dtype in (torch.int64, torch.bool):
        return torch.randint(0, 2 if dtype == torch.bool else 3, size).to(dtype)
    value = torch.randn(size, dtype=dtype)
    if value.numel() and draw(st.integers(0, 9)) == 0:
        value.view(-1)[0] = draw(st.sampled_from([math.nan, math.inf]))
    return value


@st.composite
def problems(draw: Any) -> tuple[nn.Module, Any, Any, Tensor, Tensor]:
    torch.manual_seed(draw(st.integers(0, 99)))
    model = MODELS[draw(st.sampled_from(sorted(MODELS)))]()
    loss_fn = LOSSES[draw(st.sampled_from(sorted(LOSSES)))]
    x = draw(numbers())
    x = draw(st.one_of(st.just(x), st.just(x), st.just((x,)), nonsense)) if draw(st.integers(0, 9)) == 0 else x
    model = model.to(x.dtype) if isinstance(x, Tensor) and x.dtype.is_floating_point else model
    y = draw(numbers())
    if isinstance(x, Tensor) and draw(st.integers(0, 3)):  # targets that fit
        try:
            out = model(x)
            y = (
                torch.randint(0, 2, (len(out), *out.shape[2:]))
                if "Cross" in type(loss_fn).__name__
                else torch.rand_like(out)
            )
        except Exception:
            pass
    return model, loss_fn, draw(st.sampled_from(["mean", "sum"])), x, y


def plainly(model: nn.Module, loss_fn: Any, x: Any, y: Any) -> Exception | None:
    """What plain PyTorch says."""
    try:
        loss_fn(model(*x) if isinstance(x, tuple) else model(**x) if isinstance(x, dict) else model(x), y).backward()
    except Exception as error:
        return error
    finally:
        model.zero_grad()
    return None


# What may be refused although plain PyTorch runs it, in the words of the refusal.
IN_ORDER = re.compile(
    r"the batch is empty|had an empty batch|data has no batch with samples"
    r"|\d samples in the inputs and \d in the targets|without a batch axis|^class_axis=|^loss_type must be"
    r"|may have their classes on either axis|needs logits of two classes or more|^targets have the outputs' shape"
    r"|^targets (of shape|from|must be (real numbers|class indices))"
    r"|the loss (must be a scalar|neither averages nor sums|can't be told to average)"
    r"|not finite|loss that compares samples|differ from those that plain autograd gives for that sample alone"
    r"|where (this model has its|the) \d samples( are in it)? can't be found out"
    r"|has no second derivative|no gradient of the loss reaches an analyzed parameter"
)


def outcome(run: Callable[[], Any], refused: Exception | None) -> Any:
    """What a call returns, or None for a refusal that is in order."""
    try:
        return run()
    except CurvatureError as error:
        assert refused is not None or IN_ORDER.search(str(error)), f"refused without a reason: {error}"
        return None
    except Exception as error:
        if refused is None or type(error) is not type(refused):
            raise
        return None


def right(value: Any, model: nn.Module, loss_fn: Any, x: Any, y: Any, reduction: str) -> None:
    """Hold a number against the loop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        norms = per_sample_squared_norms(model, loss_fn, x, y, shares_of=reduction)
    total = sum(t.mean() if reduction == "mean" else t.sum() for t in norms.values())
    dtype = next(model.parameters()).dtype
    if dtype == torch.bfloat16:
        assert abs(float(value) - float(total)) <= 0.1 * float(total) + 1e-3
    else:
        assert_equal(torch.as_tensor(value).double(), total, total, dtype)


@fuzz
@given(problems())
def test_empirical_fisher_trace(problem: Any) -> None:
    model, loss_fn, _, x, y = problem
    refused, before = plainly(model, loss_fn, x, y), state(model)
    value = outcome(lambda: empirical_fisher_trace(model, loss_fn, x, y), refused)
    assert_unchanged(before, model)
    if value is not None and not mixes(model, x):
        assert refused is None
        if isinstance(loss_fn, nn.Module):
            right(value, model, loss_fn, x, y, loss_fn.reduction)  # type: ignore[arg-type]
        elif loss_fn is LOSSES["summed"]:
            right(value, model, loss_fn, x, y, "sum")


@fuzz
@given(problems())
def test_fisher_report(problem: Any) -> None:
    model, loss_fn, _, x, y = problem
    refused, before = plainly(model, loss_fn, x, y), state(model)
    table = outcome(lambda: fisher_report(model, loss_fn, [(x, y)], progress=False), refused)
    assert_unchanged(before, model)
    if table is not None and not mixes(model, x):
        assert refused is None
        right(table.fisher_trace.sum(), model, loss_fn, x, y, table.attrs["reduction"])


def mixes(model: nn.Module, x: Any) -> bool:
    """Whether a sample alone has another output: attention over what has no batch axis."""
    with torch.no_grad():
        if not isinstance(x, Tensor) or not isinstance(model(x), Tensor):
            return True  # nothing to compare
        try:
            alone = torch.cat([model(x[n : n + 1]) for n in range(len(x))])
        except RuntimeError:  # of channels of one image, none makes an image
            return True
        return not torch.allclose(model(x).double(), alone.double(), 1e-2, 1e-2, equal_nan=True)


@fuzz
@given(problems())
def test_monitor(problem: Any) -> None:
    model, loss_fn, reduction, x, y = problem
    refused = plainly(model, loss_fn, x, y)

    def run() -> Tensor:
        with FisherMonitor(model, reduction) as monitor:
            loss_fn(model(*x) if isinstance(x, tuple) else model(x), y).backward()
        return monitor.trace

    value = outcome(run, refused)
    assert not any(hooks(model).values())
    # What a monitor can't see is a model or a loss that mixes samples: verify() and the functions do.
    if value is not None and loss_fn is not LOSSES["spread"] and not mixes(model, x):
        assert refused is None
        right(value, model, loss_fn, x, y, reduction)


@fuzz
@given(problems(), st.sampled_from(["nll", "bce", "mse", "poisson", "hinge"]), st.sampled_from([None, 1, 2, 10**9]))
def test_generalized_fisher_trace(problem: Any, loss_type: str, num_samples: Any) -> None:
    model, _, _, x, y = problem
    try:
        outputs = model(*x) if isinstance(x, tuple) else model(x)
    except Exception:
        return
    before = state(model)
    value = outcome(lambda: generalized_fisher_trace(model, outputs, None, loss_type, num_samples), None)
    assert_unchanged(before, model)
    if value is not None and num_samples is None and outputs_tell(outputs) and not mixes(model, x):
        dtype = next(model.parameters()).dtype
        total = sum(t.mean() for t in exact_fisher(model, x, None, loss_type).values())
        if dtype == torch.bfloat16:
            assert abs(float(value) - float(total)) <= 0.1 * float(total) + 1e-3
        else:
            assert_equal(value.double(), total, total, dtype)
    outcome(lambda: generalized_fisher_trace(model, outputs, y, loss_type, labels="observed"), None)


def outputs_tell(outputs: Any) -> bool:
    """Whether there is something to compare: with one class the Fisher is 0 whatever the outputs, NaN in the oracle's way."""
    return isinstance(outputs, Tensor) and outputs.numel() > 0 and bool(outputs.isfinite().all())


@fuzz
@given(problems())
def test_hessian_trace(problem: Any) -> None:
    model, loss_fn, _, x, y = problem
    refused, before = plainly(model, loss_fn, x, y), state(model)
    table = outcome(lambda: hessian_trace(model, loss_fn, x, y, 2), refused)
    assert_unchanged(before, model)
    assert table is None or (refused is None and table.hessian_trace.notna().all())


# Arguments that mean nothing

OPTIONS: dict[str, list[str]] = {
    "monitor": [
        *("reduction", "loss_scale", "parameters", "batch_axis", "nonfinite", "on_refusal", "repeated_calls", "every"),
    ],
    "fisher_report": [
        *("fisher", "num_samples", "loss_type", "max_batches", "reduction", "parameters", "batch_axis", "class_axis"),
        *("generator", "max_passes", "by"),
    ],
    "empirical_fisher_trace": ["num_samples"],
    "generalized_fisher_trace": [
        *("loss_type", "num_samples", "labels", "reduction", "class_axis", "generator", "max_passes", "ignore_index"),
    ],
    "hessian_trace": ["num_samples", "tolerance", "by", "generator"],
}


def called(name: str, options: dict[str, Any]) -> Any:
    model, x, y = nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4), torch.randint(3, (5,))
    match name:
        case "monitor":
            with FisherMonitor(model, **options) as monitor:
                nn.functional.cross_entropy(model(x), y).backward()
            return monitor.report()
        case "fisher_report":
            return fisher_report(model, nn.CrossEntropyLoss(), (x, y), progress=False, **options)
        case "empirical_fisher_trace":
            return empirical_fisher_trace(model, nn.CrossEntropyLoss(), x, y, **options)
        case "generalized_fisher_trace":
            return generalized_fisher_trace(model, model(x), y, **options)
        case _:
            return hessian_trace(model, nn.CrossEntropyLoss(), x, y, **{"num_samples": 2, **options})


@settings(fuzz, max_examples=60)
@pytest.mark.parametrize("name", OPTIONS)
@given(st.data())
def test_options_that_mean_nothing(name: str, data: Any) -> None:
    option = data.draw(st.sampled_from(OPTIONS[name]))
    value = data.draw(nonsense)
    if option in ("by", "loss_scale") and callable(value):
        return  # whose errors are its own
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", SlowFallbackWarning)  # which says that there was no way but one by one
            result = called(name, {option: value})
    except CurvatureError as error:
        assert option in str(error)
        return
    assert isinstance(result, Tensor | pd.DataFrame)


@settings(fuzz, max_examples=60)
@given(nonsense, nonsense, nonsense, nonsense)
def test_arguments_of_the_wrong_kind(model: Any, loss_fn: Any, x: Any, y: Any) -> None:
    loss_fn = None if callable(loss_fn) else loss_fn  # a function's errors are its own
    for run in (
        lambda: FisherMonitor(model),
        lambda: empirical_fisher_trace(model, loss_fn, x, y),
        lambda: fisher_report(model, loss_fn, x, progress=False),
        lambda: hessian_trace(model, loss_fn, x, y),
        lambda: generalized_fisher_trace(model, x, y),
        lambda: empirical_fisher_trace(nn.Linear(2, 2), loss_fn, torch.zeros(2, 2), y),
        lambda: fisher_report(nn.Linear(2, 2), nn.MSELoss(), x, progress=False),
        lambda: generalized_fisher_trace(nn.Linear(2, 2), x, y),
        lambda: FisherMonitor(nn.Linear(2, 2)).load_state_dict(x),
        lambda: FisherMonitor(nn.Linear(2, 2)).merge(x),
        lambda: register_rule(x),
    ):
        with pytest.raises(CurvatureError):
            run()
