"""What was found out about a model in earlier blocks is not taken for true when the model has changed.

Whatever changes between two blocks, the second one finds the numbers of a loop over samples in float64, and the report of a
model that nobody has watched before.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from expectations import expectation
from oracles import assert_equal, per_sample_squared_norms
from torch_secorder import FisherMonitor, register_rule
from torch_secorder.rules import registry

Change = Callable[[nn.Sequential], "nn.Module | None"]


class Scale(nn.Module):
    """A layer that no rule is for."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width).double())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Doubled(nn.Linear):
    """A Linear that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def net() -> nn.Sequential:
    layers = [
        nn.Linear(4, 5),
        nn.BatchNorm1d(5),
        nn.Tanh(),
        nn.Linear(5, 5),
        nn.Tanh(),
        nn.Linear(5, 5),
        nn.Linear(5, 3),
    ]
    return nn.Sequential(*layers[:4], Scale(5), *layers[4:]).double().eval()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 4).double(), torch.randint(3, (6,))


def watched(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> pd.DataFrame:
    """The report of a block around one step."""
    with FisherMonitor(model, **options) as monitor:
        F.cross_entropy(model(x), y).backward()
    model.zero_grad()
    return monitor.report()


def assert_right(report: pd.DataFrame, model: nn.Module, x: Tensor, y: Tensor) -> None:
    """The report has the numbers of the loop, and is that of a model which nobody has watched before."""
    with torch.no_grad():
        model(x)  # It makes pruned weights anew, without a graph, since a model with such a graph can't be copied.
    with torch.compiler.set_stance("force_eager"):
        squared = per_sample_squared_norms(model, F.cross_entropy, x, y)
    expected = {name.replace("_orig_mod.", ""): t.mean() for name, t in squared.items()}
    total, dtype = torch.stack(list(expected.values())).sum(), next(model.parameters()).dtype
    assert {*report.index} <= {*expected}
    for name in report.index:
        assert expected[name] > 0
        assert_equal(torch.tensor(report.loc[name, "fisher_trace"]), expected[name], total, dtype)
    fresh = watched(copy.deepcopy(model), x, y)
    pd.testing.assert_frame_equal(report, fresh.loc[list(report.index)], check_exact=True)


# Modules


def replace_a_module(model: nn.Sequential) -> None:
    model[3] = nn.Linear(5, 5).double()


def replace_a_module_by_a_wider_one(model: nn.Sequential) -> None:
    model[6], model[7] = nn.Linear(5, 9).double(), nn.Linear(9, 3).double()


def add_a_module(model: nn.Sequential) -> None:
    model.insert(4, nn.Linear(5, 5).double())


def add_frozen_modules(model: nn.Sequential) -> None:
    model[5] = nn.Sequential(nn.Tanh(), nn.Linear(5, 5).double().requires_grad_(False))


def remove_a_module(model: nn.Sequential) -> None:
    del model[6]


def share_a_module(model: nn.Sequential) -> None:
    model[6] = model[3]


def wrap_a_module(model: nn.Sequential) -> None:
    model[3] = nn.Sequential(model[3], Scale(5))


def swap_two_modules(model: nn.Sequential) -> None:
    model[3], model[6] = model[6], model[3]


# Parameters


def replace_a_parameter(model: nn.Sequential) -> None:
    model[3].weight = nn.Parameter(torch.randn(5, 5).double())


def remove_a_parameter(model: nn.Sequential) -> None:
    model[3].bias = None


def add_a_parameter(model: nn.Sequential) -> None:
    model[3] = nn.Linear(5, 5, bias=False).double()
    watched(model, *batch())
    model[3].bias = nn.Parameter(torch.randn(5).double())


def tie_two_parameters(model: nn.Sequential) -> None:
    model[6].weight = model[3].weight


def untie_two_parameters(model: nn.Sequential) -> None:
    tie_two_parameters(model)
    watched(model, *batch())
    model[6].weight = nn.Parameter(model[3].weight.detach().clone())


def set_other_data(model: nn.Sequential) -> None:
    model[7].weight.data, model[7].bias.data = torch.randn(4, 5).double(), torch.randn(4).double()


def freeze_a_parameter(model: nn.Sequential) -> None:
    model[3].weight.requires_grad_(False)


def freeze_a_module(model: nn.Sequential) -> None:
    model[0].requires_grad_(False)


def unfreeze_a_module(model: nn.Sequential) -> None:
    freeze_a_module(model)
    watched(model, *batch())
    model[0].requires_grad_(True)


def change_the_dtype(model: nn.Sequential) -> None:
    model.float()


# Forwards and hooks


class Twice:
    """Another forward of one layer, which a copy of the layer has for itself."""

    def __init__(self, layer: nn.Linear):
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        return 2 * F.linear(x, self.layer.weight, self.layer.bias)


def patch_a_forward(model: nn.Sequential) -> None:
    model[3].forward = Twice(model[3])  # type: ignore[assignment,method-assign,arg-type]


def change_a_class(model: nn.Sequential) -> None:
    model[3].__class__ = Doubled


def scale_an_output(model: nn.Sequential) -> None:
    model[3].register_forward_hook(lambda module, args, output: 3 * output)


def scale_an_input(model: nn.Sequential) -> None:
    model[3].register_forward_pre_hook(lambda module, args: (3 * args[0],))


# Parameters that are computed from others


def normalize_a_weight(model: nn.Sequential) -> None:
    parametrizations.weight_norm(model[3])


def no_longer_normalize_a_weight(model: nn.Sequential) -> None:
    normalize_a_weight(model)
    watched(model, *batch())
    parametrize.remove_parametrizations(model[3], "weight")


def prune_a_weight(model: nn.Sequential) -> None:
    prune.random_unstructured(model[3], "weight", 0.5)


def no_longer_prune_a_weight(model: nn.Sequential) -> None:
    prune_a_weight(model)
    watched(model, *batch())
    prune.remove(model[3], "weight")


# Other models that took its place


def copy_it(model: nn.Sequential) -> nn.Module:
    copied = copy.deepcopy(model)
    replace_a_parameter(copied)
    return copied


def pickle_it(model: nn.Sequential) -> nn.Module:
    data = pickle.dumps(model)
    assert b"torch_secorder" not in data.replace(b"test_changes_between_blocks", b"")
    return pickle.loads(data)


def pickle_it_inside_of_a_block(model: nn.Sequential) -> nn.Module:
    with FisherMonitor(model):
        data = pickle.dumps(model)
    loaded: nn.Module = pickle.loads(data)
    watched(loaded, *batch())
    return loaded


def compile_it(model: nn.Sequential) -> nn.Module:
    return torch.compile(model, backend="eager")._orig_mod  # type: ignore[attr-defined]  # of the wrapper


def compile_a_module(model: nn.Sequential) -> None:
    model[3] = torch.compile(model[3], backend="eager")


CHANGES: list[Change] = [
    *(replace_a_module, replace_a_module_by_a_wider_one, add_a_module, remove_a_module, share_a_module, wrap_a_module),
    add_frozen_modules,
    *(swap_two_modules, replace_a_parameter, remove_a_parameter, add_a_parameter, tie_two_parameters),
    *(untie_two_parameters, set_other_data, freeze_a_parameter, freeze_a_module, unfreeze_a_module, change_the_dtype),
    *(patch_a_forward, change_a_class, scale_an_output, scale_an_input, normalize_a_weight),
    *(no_longer_normalize_a_weight, prune_a_weight, no_longer_prune_a_weight, copy_it, pickle_it),
    *(pickle_it_inside_of_a_block, compile_it, compile_a_module),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_two_blocks_is_seen(change: Change) -> None:
    model: nn.Module = net()
    x, y = batch()
    for _ in range(3):
        before = watched(model, x, y)
    assert_right(before, model, x, y)
    model = change(model) or model  # type: ignore[arg-type]  # A Sequential it is.
    x = x.to(next(model.parameters()).dtype)
    for _ in range(2):
        assert_right(watched(model, x, y), model, x, y)


@pytest.mark.parametrize("change", [patch_a_forward, scale_an_output, scale_an_input, add_frozen_modules])
def test_a_change_is_seen_by_a_monitor_that_is_entered_again(change: Change) -> None:
    """These are changes under which the monitor's own list of parameters stays right."""
    model, (x, y) = net(), batch()
    monitor = FisherMonitor(model)
    with monitor:
        F.cross_entropy(model(x), y).backward()
    change(model)
    monitor.reset()
    model.zero_grad()
    with monitor:
        F.cross_entropy(model(x), y).backward()
    assert_right(monitor.report(), model, x, y)


def test_a_class_whose_forward_is_replaced_between_two_blocks() -> None:
    class Mine(nn.Linear):
        pass

    model, (x, y) = net(), batch()
    model[3] = Mine(5, 5).double()
    assert watched(model, x, y).loc["3.weight", "rule"].startswith("linear")
    Mine.forward = lambda self, x: F.linear(x, self.weight, self.bias).tanh()  # type: ignore[method-assign]
    report = watched(model, x, y)
    assert_right(report, model, x, y)
    assert not report.loc["3.weight", "rule"].startswith("linear")


def test_a_rule_that_is_registered_between_two_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_rules", dict(registry._rules))
    model, (x, y) = net(), batch()
    before = watched(model, x, y)

    @register_rule(Scale, name="ours")
    def _(module: Scale, call: Any) -> dict[str, Tensor]:
        return {"weight": call.inputs[0] * call.grad_output}

    report = watched(model, x, y)
    assert_right(report, model, x, y)
    assert not before.loc["4.weight", "rule"].startswith("ours")
    assert report.loc["4.weight", "rule"].startswith("ours")


def test_a_model_that_trains_between_two_blocks_is_refused() -> None:
    model, (x, y) = net(), batch()
    expected = watched(model, x, y)
    model.train()
    with expectation("BatchNorm1d '1': .*training mode"):
        watched(model, x, y)
    model.eval()
    pd.testing.assert_frame_equal(watched(model, x, y), expected, rtol=1e-12)


@pytest.mark.parametrize(
    "options", [{"parameters": ["*.weight"]}, {"parameters": ["3.*"]}, {"parameters": lambda name, p: p.dim() > 1}]
)
def test_other_options_in_the_next_block(options: dict[str, Any]) -> None:
    model, (x, y) = net(), batch()
    everything = watched(model, x, y)
    some = watched(model, x, y, **options)
    assert 0 < len(some) < len(everything)
    for name in some.index:
        assert some.loc[name, "fisher_trace"] == pytest.approx(everything.loc[name, "fisher_trace"], rel=1e-12)
    pd.testing.assert_frame_equal(watched(model, x, y), everything, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:a backward pass was left out")  # of which the other monitor has seen a part
def test_blocks_of_another_thread_around_the_same_model() -> None:
    """Their hooks come and go while this thread's steps run."""
    model, done, forward = net(), threading.Event(), threading.Lock()
    clean = copy.deepcopy(model)

    def enter_and_leave() -> None:
        while not done.is_set():
            with forward:  # A block that begins in the middle of a forward sees a part of it.
                monitor = FisherMonitor(model, on_refusal="skip").__enter__()
            monitor.__exit__(None, None, None)

    other = threading.Thread(target=enter_and_leave)
    other.start()
    try:
        for _ in range(20):
            x, y = batch()
            with FisherMonitor(model) as monitor:
                with forward:
                    loss = F.cross_entropy(model(x), y)
                loss.backward()
            model.zero_grad()
            expected = torch.stack([t.mean() for t in per_sample_squared_norms(clean, F.cross_entropy, x, y).values()])
            assert_equal(monitor.trace, expected.sum(), expected.sum())
    finally:
        done.set()
        other.join()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_nothing_that_is_kept_holds_what_left_the_model() -> None:
    model, (x, y) = net(), batch()
    attributes = [sorted(vars(module)) for module in model.modules()]
    for _ in range(3):
        watched(model, x, y)
    assert attributes == [sorted(vars(module)) for module in model.modules()]
    gone = [weakref.ref(model[3]), weakref.ref(model[6].weight)]
    replace_a_module(model)
    model[6].weight = nn.Parameter(torch.randn(5, 5).double())
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    whole = weakref.ref(model)
    del model
    gc.collect()
    assert whole() is None
