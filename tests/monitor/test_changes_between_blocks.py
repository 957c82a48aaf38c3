"""What was found out about a model in earlier blocks is not taken for true when the model has changed.

Whatever changes between two blocks, the second one finds the numbers of a loop over samples in float64, and the report of a
model that nobody has watched before.
"""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expectations import expectation
from monitor.model_changes import (
    CHANGES,
    Change,
    Scale,
    add_frozen_modules,
    batch,
    net,
    patch_a_forward,
    replace_a_module,
    scale_an_input,
    scale_an_output,
    watched,
)
from oracles import assert_equal, per_sample_squared_norms
from torch_secorder import FisherMonitor, register_rule
from torch_secorder.rules import registry


def assert_right(report: pd.DataFrame, model: nn.Module, x: Tensor, y: Tensor) -> None:
    """The report has the numbers of the loop, and is that of a model which nobody has watched before."""
    with torch.compiler.set_stance("force_eager"):
        with torch.no_grad():
            model(x)  # It makes pruned weights anew, without a graph, since a model with such a graph can't be copied.
        squared = per_sample_squared_norms(model, F.cross_entropy, x, y)
    expected = {name.replace("_orig_mod.", ""): t.mean() for name, t in squared.items()}
    total, dtype = torch.stack(list(expected.values())).sum(), next(model.parameters()).dtype
    assert {*report.index} == {*expected}
    for name in report.index:
        assert expected[name] > 0
        assert_equal(torch.tensor(report.loc[name, "fisher_trace"]), expected[name], total, dtype)
    fresh = watched(copy.deepcopy(model), x, y)
    pd.testing.assert_frame_equal(report, fresh.loc[list(report.index)], check_exact=True)


def test_without_a_change_the_third_block_is_as_the_first() -> None:
    model, (x, y) = net(), batch()
    for _ in range(3):
        report = watched(model, x, y)
    assert_right(report, model, x, y)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_two_blocks_is_seen(change: Change) -> None:
    model: nn.Module = net()
    x, y = batch()
    for _ in range(3):
        watched(model, x, y)
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


@pytest.mark.slow
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
