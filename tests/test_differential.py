"""Every driver gives the same numbers: the monitor, the report and the functions, on every problem and in every setting.

The loss is the negative log-likelihood of a Gaussian of unit variance, summed over a sample's elements, so that
`generalized_fisher_trace(labels="observed")` means the same number as the others. In float64 every driver's numbers in every
setting are those of a plain step under a monitor, which the tests of the rules hold against a loop over samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from expectations import expectation
from oracles import Inputs, call, mapped
from problems import AWKWARD, PROBLEMS, repeats
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report, generalized_fisher_trace

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),  # re-entrant checkpoints
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),  # of norms under autocast
]
EVERY = {problem.name: problem for problem in [*PROBLEMS, *AWKWARD]}
one_by_one = pytest.mark.filterwarnings(
    "ignore:the graph of these outputs does not show"
)  # since a checkpoint threw it away
OTHERS = [name for name, problem in EVERY.items() if not repeats(problem)]


def of_names(*names: str) -> pytest.MarkDecorator:
    def marks(name: str) -> list[pytest.MarkDecorator]:
        return [one_by_one] * ("checkpointed" in name)

    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in names])


HALVES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}

Traces = dict[str, float]  # by parameter; the total by ""
EXACT, AS_CAPTURED, OF_HALF = 1e-8, 1e-4, 1e-3  # relative tolerances, as DESIGN says what "equal" means


@dataclass(frozen=True)
class Step:
    """What all drivers run: a model on batches, each with its targets.

    Attributes:
        autocast: the dtype that everything runs in, forward and backward, as the functions do both.
        scale: what the loss is multiplied by.
        verify: let the report check its first batch as the function of one batch does, which takes as long as the rest.
    """

    model: nn.Module
    batches: tuple[tuple[Inputs, Tensor], ...]
    reduction: str = "mean"
    batch_axis: int = 0
    autocast: torch.dtype | None = None
    scale: float = 1.0
    verify: bool = False

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        total = (outputs - targets).square().sum() * (self.scale / 2)
        return total / outputs.shape[self.batch_axis] if self.reduction == "mean" else total

    def context(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", self.autocast) if self.autocast else nullcontext()

    @property
    def options(self) -> dict[str, Any]:
        return {"batch_axis": self.batch_axis} if self.batch_axis else {}


class Wrapped(nn.Module):
    """A problem's model inside of another."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body


@cache
def plain(name: str, dtype: torch.dtype = torch.float64) -> Step:
    setting = EVERY[name].setting(dtype)
    return Step(setting.model, ((setting.inputs, setting.targets),))


@cache
def expected(name: str) -> Traces:
    return monitor(plain(name))


def under_autocast(name: str, half: torch.dtype, scale: float = 1.0) -> Step:
    """Targets are numbers of half precision, so that their difference from outputs is rounded once, in every driver's way."""
    step = plain(name, torch.float32)
    batches = tuple((inputs, targets.to(half).float()) for inputs, targets in step.batches)
    return replace(step, batches=batches, autocast=half, reduction="sum", scale=scale)


# The drivers


def of_table(table: pd.DataFrame, step: Step) -> Traces:
    prefix = "body." if isinstance(step.model, Wrapped) else ""
    traces = {name.removeprefix(prefix): float(value) for name, value in table["fisher_trace"].items()}
    return traces | {"": sum(traces.values())}


def monitor(step: Step) -> Traces:
    with FisherMonitor(step.model, step.reduction, **step.options) as watching, step.context():
        for inputs, targets in step.batches:
            step.loss(call(step.model, inputs), targets).backward()
    return of_table(watching.report(), step)


def report(step: Step) -> Traces:
    with step.context():
        table = fisher_report(
            step.model, step.loss, list(step.batches), progress=False, verify=step.verify, **step.options
        )
    return of_table(table, step)


def empirical(step: Step) -> Traces:
    return pooled(step, lambda x, y: empirical_fisher_trace(step.model, step.loss, x, y))


def observed(step: Step) -> Traces:
    def trace(x: Inputs, y: Tensor) -> Tensor:
        outputs = call(step.model, x)
        return generalized_fisher_trace(step.model, outputs, y, "mse", labels="observed", reduction=step.reduction)

    return pooled(step, lambda x, y: step.scale**2 * trace(x, y))  # the log-likelihood itself has no scale


def pooled(step: Step, trace: Callable[[Inputs, Tensor], Tensor]) -> Traces:
    """The trace of all batches, by a function of one."""
    with step.context():
        sizes, values = zip(*((len(y), float(trace(x, y))) for x, y in step.batches), strict=True)
    weights = [n / sum(sizes) if step.reduction == "mean" else 1 for n in sizes]
    return {"": sum(weight * value for weight, value in zip(weights, values, strict=True))}


DRIVERS: dict[str, Callable[[Step], Traces]] = {
    "monitor": monitor,
    "report": report,
    "empirical": empirical,
    "observed": observed,
}
BUT_THE_MONITOR = ("report", "empirical", "observed")
Refusals = dict[str, str]  # driver -> what it says


def refusals_of(name: str) -> Refusals:
    """Drivers that differentiate by themselves refuse some problems that a monitor analyzes."""
    if name == "awkward-checkpointed_reentrant":  # in the user's own run it stays re-entrant
        return {"observed": r"use_reentrant=False.* or a FisherMonitor"}
    return dict.fromkeys(BUT_THE_MONITOR, EVERY[name].refusal)


def assert_all_equal(
    step: Step,
    right: Traces,
    refusals: Refusals,
    rtol: float = EXACT,
    of_observed: float | None = None,
    drivers: Sequence[str] = tuple(DRIVERS),
) -> None:
    """Each driver gives the right traces, or is refused in its words."""
    for driver in drivers:
        with expectation(refusals.get(driver, "")):
            tolerance = of_observed if of_observed and driver == "observed" else rtol
            assert_close(DRIVERS[driver](step), right, tolerance, f"{driver} {HALVES.get(step.autocast, '')}")


def assert_close(found: Traces, right: Traces, rtol: float, what: str) -> None:
    assert found.keys() in (right.keys(), {""}), what
    for key, value in found.items():
        off = abs(value - right[key])
        # Gradients that are zero by symmetry differ by their rounding alone.
        assert off <= rtol * right[key] + 1e-12 * right[""], f"{what} {key}: {value}, not {right[key]}"


# The settings


@of_names(*EVERY)
def test_plain(name: str) -> None:
    step = replace(plain(name), verify=EVERY[name] in AWKWARD)
    assert_all_equal(step, expected(name), refusals_of(name), drivers=BUT_THE_MONITOR)


@of_names(*OTHERS)
def test_several_batches(name: str) -> None:
    """Pooled, by those that can pool."""
    ((inputs, targets),) = plain(name).batches
    parts = (slice(0, 1), slice(1, None)) if len(targets) > 1 else (slice(None),)
    batches = tuple((mapped(inputs, lambda x, part=part: x[part]), targets[part]) for part in parts)
    step = replace(plain(name), batches=batches)
    refusals = refusals_of(name)
    if name == "awkward-checkpointed_reentrant":  # of 4 samples, as many as it has features
        refusals["monitor"] = r"leave open where its 4 samples are, and what shows it is hidden, by re-entrant"
    assert_all_equal(step, expected(name), refusals, drivers=("monitor", "report"))


class Checkpointed(Wrapped):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.body, *args, use_reentrant=False, **kwargs)


UNREADABLE = r"used by \w+ inside of activation checkpointing"
MISPLACED = r"whose axis 0 is not the batch of \d samples; pass batch_axis="
# What needs the graph to be read, which shows in a checkpoint neither uses of parameters nor where samples are.
IN_A_CHECKPOINT = {
    UNREADABLE: (
        *("linear_by_the_embedding", "transposed_decoder", "functional_only", "weight_in_the_loss", "other_forward"),
        *("patched_forward", "pruned", "parametrized", "weight_normed", "linear_on_one_vector", "multihead_attention"),
        *("lstm", "embedding_bag"),
    ),
    MISPLACED: (
        *("positions_of_batch_1", "positions_without_batch", "positions_after_dropout", "sequence_first"),
        *("windows_in_the_batch", "batch_folded_into_rows"),
    ),
}
REFUSED_IN_A_CHECKPOINT: dict[str, Refusals] = {
    f"awkward-{name}": dict.fromkeys(("monitor", "report", "empirical"), refusal)
    for refusal, names in IN_A_CHECKPOINT.items()
    for name in names
} | {
    # Those that differentiate by themselves look for the samples, and run the checkpoint again for it.
    "awkward-positions_without_batch_as_many_as_samples": dict.fromkeys(
        ("report", "empirical"), r"was called outside of a call of the monitored model"
    ),
}


@pytest.mark.slow
@one_by_one
@pytest.mark.parametrize("name", OTHERS)
def test_checkpointed(name: str) -> None:
    step = replace(plain(name), model=Checkpointed(plain(name).model))
    assert_all_equal(step, expected(name), refusals_of(name) | REFUSED_IN_A_CHECKPOINT.get(name, {}))


class OnTheSecondAxis(Wrapped):
    """Looks the same from outside, and has its samples on the second axis inside."""

    def forward(self, *args: Tensor) -> Tensor:
        return self.body(*(x.transpose(0, 1) for x in args)).transpose(0, 1)


POSITIONWISE = [  # problems whose first two axes may change places
    *(f"linear-{n}d{bias}" for n in (3, 4, 5) for bias in ("", "-no_bias")),
    *(
        "linear-one_sample_3d",
        "linear-one_input",
        "linear-wide_with_few_positions",
        "linear-narrow_with_many_positions",
    ),
    *("linear-as_many_samples_as_positions", "linear-deep_3d", "embedding-repeated_ids", "embedding-distinct_ids"),
    *("embedding-long", "embedding-ids_of_3_axes", "embedding-padding_idx", "embedding-padding_idx_negative"),
    *("embedding-only_padding", "embedding-int32_ids", "embedding-sparse", "embedding-sparse_padding_idx"),
    *("embedding-deep", "embedding-same_ids_in_every_sample", "norm-layer-3d", "norm-rms-3d", "norm-layer-4d"),
    *(
        "norm-rms-4d",
        "norm-layer-eps",
        "norm-layer-no_bias",
        "norm-layer-no_affine",
        "norm-rms-eps",
        "norm-rms-two_axes",
    ),
    *("norm-layer-two_axes_and_a_middle_one", "norm-rms-default_eps", "norm-rms-no_affine", "prelu-2d-1", "prelu-3d-1"),
    *("prelu-4d-1", "bilinear-3d", "bilinear-4d", "bilinear-wide", "bilinear-no_bias_3d", "bilinear-deep"),
    *("tied-embedding_and_head", "tied-embedding_and_head_with_bias", "tied-embedding_and_head_with_padding"),
    *("tied-wide_embedding_and_head", "tied-linear_3d_weight", "tied-linear_3d_bias", "tied-linear_3d_weight_and_bias"),
    *(
        "tied-layer_norms",
        "tied-norm_weight_and_linear_bias",
        "reused-linear_three_times_3d",
        "reused-wide_linear_twice",
    ),
    *("reused-layer_norm_twice", "reused-prelu_on_two_shapes", "inplace-linear_3d", "inplace-linear_3d_no_bias"),
    *("inplace-linear_4d", "inplace-layer_norm", "inplace-embedding", "inplace-rms_norm", "inplace-bilinear_3d"),
    *("inplace-residual", "frozen-norm_weight", "frozen-embedding", "frozen-tied_head", "use-submodule_called_output"),
    *("use-residual", "awkward-linear_by_the_embedding", "awkward-sequence_first", "awkward-sequence_first_square"),
    *("awkward-batch_folded_into_rows", "awkward-embedding_of_max_norm"),
]


@pytest.mark.parametrize("name", POSITIONWISE)
def test_samples_on_the_second_axis_are_found(name: str) -> None:
    step = replace(plain(name), model=OnTheSecondAxis(plain(name).model))
    assert_all_equal(step, expected(name), {})


@pytest.mark.parametrize("name", [name for name in POSITIONWISE if not name.startswith("awkward")])
def test_samples_on_the_second_axis_as_given(name: str) -> None:
    ((inputs, targets),) = plain(name).batches
    batches = ((mapped(inputs, lambda x: x.transpose(0, 1)), targets.transpose(0, 1)),)
    step = replace(plain(name), batches=batches, batch_axis=1)
    assert_all_equal(step, expected(name), {}, drivers=("monitor", "report"))


# Half precision

# Torch itself doesn't run these so, or not on every machine.
NOT_IN_HALF = {"bilinear-deep", "use-layers_by_keyword", "awkward-lstm"}


@pytest.mark.slow
@of_names(*(name for name in OTHERS if name not in NOT_IN_HALF))
def test_trap_21_autocast(name: str) -> None:
    """The same tensors are captured whoever drives, so that rounding to half precision makes no difference between them.

    Only where nodes of the graph are called, each sample's gradient is rounded once more: (1 + eps / 2)^2 - 1 is eps.
    """
    for half in HALVES:
        step = under_autocast(name, half)
        eps = torch.finfo(half).eps
        assert_all_equal(step, monitor(step), refusals_of(name), AS_CAPTURED, eps, BUT_THE_MONITOR)


def of_captured_tensors(step: Step) -> Traces:
    """The traces of Linear layers in float64, from each one's input as autocast gives it and its output's gradient."""
    seen: dict[str, list[Tensor]] = {}

    def remember(name: str, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        seen[name] = [args[0].detach().to(step.autocast).double()]
        output.register_hook(lambda grad: seen[name].append(grad.double()))

    layers = {name: module for name, module in step.model.named_modules() if isinstance(module, nn.Linear)}
    handles = [layer.register_forward_hook(partial(remember, name)) for name, layer in layers.items()]
    with step.context():
        ((inputs, targets),) = step.batches
        step.loss(call(step.model, inputs), targets).backward()
    for handle in handles:
        handle.remove()
    traces = {}
    for name, layer in layers.items():
        a, g = (x.reshape(len(targets), -1, x.shape[-1]) for x in seen[name])
        own = {"weight": torch.einsum("nti,nto->noi", a, g), "bias": g.sum(1)}
        for local, _ in layer.named_parameters():
            traces[f"{name}.{local}".removeprefix(".")] = float(own[local].square().sum())
    return traces | {"": sum(traces.values())}


@pytest.mark.parametrize("half", HALVES, ids=HALVES.get)
@pytest.mark.parametrize("scale", [1.0, 2.0**-12], ids=["large", "squares underflow in half precision"])
@pytest.mark.parametrize("name", [name for name in EVERY if name.startswith("linear-")])
def test_sums_under_autocast_are_those_of_the_tensors_as_captured(name: str, scale: float, half: torch.dtype) -> None:
    step = under_autocast(name, half, scale)
    assert_all_equal(step, of_captured_tensors(step), {}, OF_HALF)
