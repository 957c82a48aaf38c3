"""A monitor may be read, reset, entered again and left in any order, and leaves nothing behind."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model_state import assert_same_gradients, assert_unchanged, gradients, hooks, state
from monitor.classifier import (
    assert_report,
    backward,
    batch,
    classifier,
    cross_entropy,
    norms,
)
from oracles import (
    assert_equal,
)
from torch_secorder import FisherMonitor
from torch_secorder.errors import CurvatureError

# Lifecycle


@pytest.mark.parametrize("read", ["trace", "diagonal", "per_sample", "activations", "report"])
def test_reading_before_any_sample_raises(read: str) -> None:
    monitor = FisherMonitor(classifier(), diagonal=True, per_sample=True, activations=True)
    assert monitor.n_samples == 0
    with pytest.raises(CurvatureError, match=r"(?i)no sample|backward"):
        monitor.report() if read == "report" else getattr(monitor, read)


@pytest.mark.parametrize("read", ["diagonal", "per_sample", "activations"])
def test_reading_what_was_not_asked_for_raises(read: str) -> None:
    model = classifier()
    with FisherMonitor(model) as monitor:
        backward(model, *batch())
    with pytest.raises(CurvatureError, match=rf"{read}=True"):
        getattr(monitor, read)


def test_reset_forgets_and_starts_again() -> None:
    model, first, second = classifier(), batch(5), batch(3)
    monitor = FisherMonitor(model, per_sample=True, diagonal=True)
    with monitor:
        backward(model, *first)
        monitor.reset()
        assert monitor.n_samples == 0
        with pytest.raises(CurvatureError, match=r"(?i)no sample"):
            _ = monitor.trace
        backward(model, *second)
    assert_report(monitor, norms(model, second))
    assert len(monitor.per_sample) == 3
    assert_equal(sum(d.sum() for d in monitor.diagonal.values()), monitor.trace, monitor.trace, torch.float64)


def test_entering_again_goes_on_accumulating() -> None:
    model, first, second = classifier(), batch(5), batch(3)
    monitor = FisherMonitor(model)
    for data in (first, second):
        with monitor:
            backward(model, *data)
        assert not any(hooks(model).values())
        backward(model, *data)  # outside: counts for nothing
    assert_report(monitor, norms(model, first, second))


def test_nested_entry_raises_and_the_outer_block_goes_on() -> None:
    model, data = classifier(), batch()
    with FisherMonitor(model) as monitor:
        with pytest.raises(CurvatureError, match=r"(?i)nested|already|entered|active|inside"), monitor:
            pytest.fail("entered twice")
        backward(model, *data)
    assert_report(monitor, norms(model, data))
    assert not any(hooks(model).values())


def test_monitors_on_one_model_are_independent() -> None:
    model, first, second = classifier(), batch(5), batch(3)
    with FisherMonitor(model) as outer:
        backward(model, *first)
        with FisherMonitor(model, reduction="mean", per_sample=True) as inner:
            backward(model, *second)
        assert any(hooks(model).values())
        inner.reset()
        backward(model, *second)
    assert_report(outer, norms(model, first, second, second))
    assert inner.n_samples == 0
    assert not any(hooks(model).values())


def test_monitors_may_be_left_in_another_order() -> None:
    model, data = classifier(), batch()
    one, two = FisherMonitor(model), FisherMonitor(model)
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    backward(model, *data)
    two.__exit__(None, None, None)
    assert one.n_samples == 0
    assert_report(two, norms(model, data))
    assert not any(hooks(model).values())


def test_a_monitor_of_a_part_of_the_model() -> None:
    model, data = classifier(), batch()
    with FisherMonitor(model[2]) as monitor:
        backward(model, *data)
    squared = norms(model, data)
    assert_report(monitor, {name: squared[f"2.{name}"] for name in ("weight", "bias")})


# Nothing is left behind


def test_an_exception_inside_leaves_nothing_and_loses_nothing() -> None:
    model, first, second = classifier(), batch(5), batch(3)
    before, monitor = state(model), FisherMonitor(model)
    with pytest.raises(RuntimeError, match="mine"), monitor:
        assert any(hooks(model).values())
        backward(model, *first)
        cross_entropy()(model(second[0]), second[1])
        raise RuntimeError("mine")
    model.zero_grad()
    assert_unchanged(before, model)
    assert_report(monitor, norms(model, first))
    with monitor:
        backward(model, *second)
    assert_report(monitor, norms(model, first, second))


def test_an_exception_inside_forward_or_backward_leaves_nothing() -> None:
    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError("broken backward")

    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.when = nn.Linear(4, 4), nn.Linear(4, 3), ""

        def forward(self, x: Tensor) -> Tensor:
            h = self.one(x)
            if self.when == "forward":
                raise RuntimeError("broken forward")
            return self.two(Breaks.apply(h) if self.when == "backward" else h.tanh())

    model, data = Fragile().double(), batch()
    monitor = FisherMonitor(model)
    for model.when in ("forward", "backward"):
        with pytest.raises(RuntimeError, match=f"broken {model.when}"), monitor:
            backward(model, *data)
        assert not any(hooks(model).values())
    model.when = ""
    with monitor:
        for model.when in ("forward", "backward", ""):
            if model.when:
                with pytest.raises(RuntimeError, match=f"broken {model.when}"):
                    backward(model, *data)
            else:
                backward(model, *data)
    assert_report(monitor, norms(model, data))


def test_leaving_a_loop_in_the_middle_leaves_nothing() -> None:
    model, data = classifier(), batch()
    for _ in range(2):
        with FisherMonitor(model) as monitor:
            backward(model, *data)
            model(data[0])
            break
    assert not any(hooks(model).values())
    assert_report(monitor, norms(model, data))


def test_a_backward_after_the_block_is_as_if_there_had_been_none() -> None:
    model, (x, y) = classifier(), batch()
    with FisherMonitor(model) as monitor:
        loss = cross_entropy()(model(x), y)
    loss.backward()
    mine = gradients(model)
    model.zero_grad()
    backward(model, x, y)
    assert_same_gradients(mine, gradients(model))
    assert monitor.n_samples == 0


def test_nothing_is_written_on_the_model() -> None:
    model, data = classifier(), batch()
    before = state(model)
    with FisherMonitor(model, diagonal=True, per_sample=True, activations=True) as monitor:
        backward(model, *data)
        model.zero_grad()
        inside = state(model)
        assert inside["attributes"] == before["attributes"]
        assert inside["parameter_attributes"] == before["parameter_attributes"]
    monitor.report()
    assert_unchanged(before, model)


def test_the_users_own_hooks_stay() -> None:
    model, data, calls = classifier(), batch(), []
    model[0].register_forward_hook(lambda module, args, output: calls.append("forward"))
    model[2].register_forward_hook(lambda module, args, output: output * 2)
    before = state(model)
    with FisherMonitor(model) as monitor:
        backward(model, *data)
    model.zero_grad()
    assert_unchanged(before, model)
    assert calls == ["forward"]
    assert_report(monitor, norms(model, data))


@pytest.mark.parametrize("where", ["inside", "after"])
def test_the_monitor_keeps_no_forward_alive(where: str) -> None:
    """A forward that no backward follows is gone with its outputs, at once for all of its layers."""
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)])
    seen: list[weakref.ref[Tensor]] = []

    def dead() -> bool:
        gc.collect()
        return all(tensor() is None for tensor in seen)

    for layer in model:
        layer.register_forward_hook(lambda module, args, output: seen.append(weakref.ref(args[0])))
    with FisherMonitor(model) as monitor:
        model(torch.randn(5, 4)).sum().backward()
        for _ in range(3):
            model(torch.randn(5, 4))
        if where == "inside":
            assert dead()
    assert dead()
    assert len(seen) == 24
    assert monitor.n_samples == 5


def test_a_copy_made_inside_the_block_is_nobodys() -> None:
    model, data = classifier(), batch()
    with FisherMonitor(model) as monitor:
        backward(model, *data)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            backward(twin, *data)
    backward(twin, *data)
    assert_report(monitor, norms(model, data))
    assert not any(hooks(copy.deepcopy(model)).values())
