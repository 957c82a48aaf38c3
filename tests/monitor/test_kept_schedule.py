"""Blocks around single steps have their sums checked as one block around all of them, until something is another."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monitor.classifier import backward, batch, classifier
from torch_secorder import FisherMonitor, register_rule
from torch_secorder import monitor as monitor_module
from torch_secorder.batch_axis.knowledge import is_due
from torch_secorder.errors import CoverageError
from torch_secorder.recording.backward_pass import BackwardPass
from torch_secorder.recording.user_recorder import UserRecorder
from torch_secorder.rules import registry
from torch_secorder.verification.pass_counter import PassCounter

pytestmark = pytest.mark.usefixtures("_innermost")
Step = Callable[[nn.Module], object]


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For each pass how many gradients it noted along a direction, which it does where sums are checked."""
    found: list[int] = []
    count = PassCounter.on_pass

    def note(counter: PassCounter, recorder: UserRecorder, current: BackwardPass) -> None:
        found.append(len(current.projections))
        count(counter, recorder, current)

    monkeypatch.setattr(PassCounter, "on_pass", note)
    return found


@pytest.fixture
def _innermost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the callers of `one_block` be no part of a block's place, so that only what a test changes is another."""
    place = monitor_module.users_place
    monkeypatch.setattr(monitor_module, "users_place", lambda: place()[1:2])  # The first one is this function.


def one_block(model: nn.Module, **options: Any) -> None:
    """A step in a block of its own, always at this place of the program."""
    x, y = batch()
    with FisherMonitor(model, **options):
        backward(model, x.to(next(model.parameters()).dtype), y)


def settled(model: nn.Module, checked: list[int], **options: Any) -> None:
    """Make blocks until the next two are not checked."""
    for _ in range(5):
        one_block(model, **options)
    assert [bool(count) for count in checked] == [True, True, True, False, True]
    one_block(model, **options)
    assert not checked[-1]
    checked.clear()


def test_blocks_at_one_place_are_checked_as_the_steps_of_one_block(checked: list[int]) -> None:
    model = classifier()
    for _ in range(18):
        one_block(model)
    assert [bool(count) for count in checked] == [is_due(number) for number in range(1, 19)]


def test_a_block_that_is_entered_again_goes_on_with_the_schedule(checked: list[int]) -> None:
    model = classifier()
    monitor, batches = FisherMonitor(model), [batch() for _ in range(6)]
    for one in batches:
        with monitor:
            backward(model, *one)
    assert [bool(count) for count in checked] == [is_due(number) for number in range(1, 7)]
    assert monitor.n_samples == sum(len(one[0]) for one in batches)


def test_another_place_begins_anew(checked: list[int]) -> None:
    model = classifier()
    settled(model, checked)
    with FisherMonitor(model):
        backward(model, *batch())
    assert checked == [4]


def test_another_model_begins_anew(checked: list[int]) -> None:
    settled(classifier(), checked)
    one_block(classifier())
    assert checked == [4]


@pytest.mark.parametrize(
    "options", [{"per_sample": True}, {"max_memory": 2**30}, {"repeated_calls": "same"}, {"parameters": ["0.*"]}]
)
def test_other_options_begin_anew(options: dict[str, Any], checked: list[int]) -> None:
    model = classifier()
    settled(model, checked)
    one_block(model, **options)
    assert checked[0] > 0


def replace_parameter(model: Any) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def add_forward_hook(model: Any) -> None:
    model[1].register_forward_hook(lambda module, args, output: None)


def evaluate(model: Any) -> None:
    model.eval()


def freeze(model: Any) -> None:
    model[0].weight.requires_grad_(False)


def change_dtype(model: Any) -> None:
    model.float()


def replace_module(model: Any) -> None:
    model[1] = nn.Sigmoid()


CHANGES = [replace_parameter, add_forward_hook, evaluate, freeze, change_dtype, replace_module]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_begins_anew(change: Step, checked: list[int]) -> None:
    model = classifier()
    settled(model, checked)
    change(model)
    one_block(model)
    assert checked[0] > 0


def test_another_rule_begins_anew_and_is_found_wrong(checked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    monkeypatch.setattr(registry, "_rules", dict(registry._rules))
    register_rule(Scale)(lambda module, call: {"weight": call.inputs[0] * call.grad_output})
    model = nn.Sequential(classifier(), Scale())
    settled(model, checked)
    register_rule(Scale)(lambda module, call: {"weight": 2 * call.inputs[0] * call.grad_output})
    with pytest.raises(CoverageError, match="a rule is wrong"):
        one_block(model)
    with pytest.raises(CoverageError, match="a rule is wrong"):  # counting began anew
        one_block(model)


def test_a_refused_pass_begins_anew(checked: list[int]) -> None:
    model = classifier()

    def penalized(weight: float) -> None:
        with FisherMonitor(model):
            x, y = batch()
            loss = nn.functional.cross_entropy(model(x), y)
            (loss + weight * sum(p.square().sum() for p in model.parameters()) if weight else loss).backward()

    for _ in range(8):
        penalized(0.0)
    for _ in range(2):  # the 9th is due, and then the 1st of the new count
        with pytest.raises(CoverageError, match="weight penalty"):
            penalized(0.1)


def test_what_is_kept_does_not_keep_the_model(checked: list[int]) -> None:
    model = classifier()
    settled(model, checked)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
