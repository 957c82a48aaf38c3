"""The harness notices what it is there for: a bit, a call, a random number, a hook that stays."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torch_secorder.errors import ArgumentError, SlowFallbackWarning
from traps.exactness import numbers
from user_program.hooks import packed, retained_gradients, tensor_hooks
from user_program.observed import Run, assert_unnoticed, differences, observed
from user_program.program import Program
from user_program.snapshots import difference, snapshot
from user_program.subjects import MLP

Fault = Callable[[Run, nn.Module, Tensor], Any]  # what a careless library does in a watched run, of the loss too


def program(fault: Fault, before: bool) -> Callable[[Run], None]:
    """A step of a model, with a fault before its backward pass or after it."""

    def run_it(run: Run) -> None:
        model = MLP.model()
        run.look_at(model)
        tensor_hooks(run, model)
        retained_gradients(run, model)
        x, y = MLP.batch()
        with run.step():
            with packed(run):
                loss = numbers(model(x), y)
            if run.watched and before:
                fault(run, model, loss)
            loss.backward()
            if run.watched and not before:
                fault(run, model, loss)

    return run_it


def last_bit(run: Run, model: nn.Module, loss: Tensor) -> None:
    weight = model[0].weight
    weight.grad.view(torch.int64)[0, 0] ^= 1


def a_pass_with_seeds(run: Run, model: nn.Module, loss: Tensor) -> None:
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)


def a_hook_that_stays(run: Run, model: nn.Module, loss: Tensor) -> None:
    model[1].register_forward_hook(lambda *args: None)


def a_hook_on_a_parameter(run: Run, model: nn.Module, loss: Tensor) -> None:
    model[0].weight.register_hook(lambda grad: None)


def a_write_in_place(run: Run, model: nn.Module, loss: Tensor) -> None:
    with torch.no_grad():
        model[0].bias.add_(0)


def a_foreign_tensor_packed(run: Run, model: nn.Module, loss: Tensor) -> None:
    with packed(run):
        torch.ones(2, requires_grad=True).exp()


def other_strides(run: Run, model: nn.Module, loss: Tensor) -> None:
    model[0].weight.grad = model[0].weight.grad.t().contiguous().t()


def a_warning(run: Run, model: nn.Module, loss: Tensor) -> None:
    warnings.warn("of the library's making", UserWarning, stacklevel=2)


FAULTS: dict[str, tuple[Fault, bool, str]] = {
    "last bit": (last_bit, False, r"\.grad of '0.weight': .* of which 1 numbers differ"),
    "a pass": (a_pass_with_seeds, True, r"the tensor hook on 0 was called 2 times for 1"),
    "a retained gradient": (a_pass_with_seeds, True, r"\.grad of 'the output of 0': .* differ by up to"),
    "a hook on a module": (a_hook_that_stays, False, r"at the end: hooks of '1._forward_hooks': 3 for 2"),
    "a hook on a parameter": (a_hook_on_a_parameter, False, r"hooks of '0.weight._backward_hooks': 1 for 0"),
    "torch's random numbers": (lambda *_: torch.rand(1), True, "torch's random state"),
    "python's random numbers": (lambda *_: random.random(), True, "python's random state"),
    "numpy's random numbers": (lambda *_: np.random.random(), True, "numpy's random state"),
    "a write": (a_write_in_place, False, r"version of '0.bias': \d+ for \d+"),
    "an attribute": (lambda run, model, loss: setattr(model, "seen", 1), False, r"attributes of '': with 'seen'"),
    "a mode": (lambda run, model, loss: model.eval(), False, r"modes of '0': False for True"),
    "requires_grad": (
        lambda run, model, loss: model[2].bias.requires_grad_(False),
        False,
        r"requires_grad of '2.bias'",
    ),
    "strides": (other_strides, False, r"\.grad of '0.weight': .*strides \(1, 8\)"),
    "a gradient that is gone": (lambda run, model, loss: model.zero_grad(), False, r"\.grad of '2.bias': None for"),
    "a setting": (lambda *_: torch.set_anomaly_enabled(True), False, "'anomaly mode': True for 'unchanged'"),
    "a warning": (a_warning, False, "a warning under the monitor only"),
    "a packed tensor": (a_foreign_tensor_packed, False, "packed that isn't the program's"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed_and_named(name: str) -> None:
    fault, before, words = FAULTS[name]
    try:
        watched, plain = (observed(program(fault, before), watched) for watched in (True, False))
    finally:
        torch.set_anomaly_enabled(False)
    with pytest.raises(AssertionError, match=r"(?s)runs otherwise under the monitor.*" + words):
        assert_unnoticed(watched, plain)


def test_what_does_nothing_is_not_noticed() -> None:
    nothing = program(lambda *_: None, before=True)
    assert_unnoticed(observed(nothing, watched=True), observed(nothing, watched=False))
    assert observed(nothing, watched=False).calls


def test_a_warning_of_the_librarys_own_kind_is_allowed() -> None:
    warned = program(lambda *_: warnings.warn("slow", SlowFallbackWarning, stacklevel=2), before=True)
    assert_unnoticed(observed(warned, watched=True), observed(warned, watched=False))


def test_a_call_in_another_order_is_noticed() -> None:
    def in_order(*names: str) -> Run:
        return observed(lambda run: [run.note(name, 1.0) for name in names], watched=False)

    assert differences(in_order("one", "two"), in_order("two", "one")) == ["call 1 of a hook: one for two"]
    assert differences(in_order("one"), in_order("one", "one")) == [
        "one was called 1 times for 2",
        "call 2 of a hook: nothing for one",
    ]


def test_a_saved_tensor_that_is_not_packed_is_noticed() -> None:
    def packing(*values: float) -> Run:
        return observed(lambda run: run.packed.extend(snapshot(torch.tensor(value)) for value in values), watched=False)

    assert not differences(packing(1.0, 2.0, 2.0), packing(1.0, 2.0))
    assert differences(packing(2.0, 1.0), packing(1.0, 2.0)) == ["saved tensor 2 isn't packed in its turn: [2]"]


SNAPSHOTS = {
    "nan": torch.tensor([1.0, float("nan")]),
    "bfloat16": torch.tensor([1.0, 2.0]).to(torch.bfloat16),
    "sparse": torch.tensor([[1.0, 0.0], [0.0, 2.0]]).to_sparse(),
    "complex": torch.tensor(1 + 2j),
}


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_a_snapshot_equals_itself_only(name: str) -> None:
    tensor = SNAPSHOTS[name]
    assert not difference(snapshot(tensor), snapshot(tensor.clone()))
    assert "differ by up to" in difference(snapshot(tensor * 2), snapshot(tensor))
    assert difference(snapshot(tensor.to(torch.complex128)), snapshot(tensor))
    assert difference(snapshot(tensor.requires_grad_()), snapshot(tensor.detach()))


def test_a_snapshot_knows_zeros_apart_and_shapes_without_elements() -> None:
    assert "of which 1 numbers differ" in difference(
        snapshot(torch.tensor([0.0, 1])), snapshot(torch.tensor([-0.0, 1]))
    )
    assert not difference(snapshot(torch.empty(0, 3)), snapshot(torch.empty(0, 3)))
    assert difference(snapshot(torch.empty(0, 3)), snapshot(torch.empty(3, 0)))


def test_a_snapshot_does_not_change_with_its_tensor() -> None:
    tensor = torch.zeros(2)
    before = snapshot([tensor, {"a": tensor}])
    tensor.add_(1)
    assert difference(snapshot([tensor, {"a": tensor}]), before)


# The outcome


def of_a_step(fault: Callable[[Run], Any] = lambda run: nullcontext(), expect: float = 1.0) -> Callable[[Run], None]:
    def run_it(run: Run) -> None:
        model = MLP.model()
        x, y = MLP.batch()
        with run.block(model):
            run.expect(lambda: {name: torch.ones(6).double() * expect for name, _ in model.named_parameters()})
            with run.step():
                numbers(model(x), y).backward()
                if run.watched:
                    fault(run)

    return run_it


def refuse(run: Run) -> None:
    raise ArgumentError("not to be had")


def test_a_wrong_number_is_no_outcome() -> None:
    with pytest.raises(AssertionError, match="worst relative error"):
        Program("wrong", of_a_step()).assert_outcome()


def test_a_refusal_has_its_words_and_leaves_its_samples_out() -> None:
    with pytest.raises(AssertionError, match="not to be had"):
        Program("exact", of_a_step(refuse)).assert_outcome()
    with pytest.raises(AssertionError, match="not to be had"):
        Program("other words", of_a_step(refuse), refused="at the end").assert_outcome()
    with pytest.raises(AssertionError, match="nothing was refused"):
        Program("counted", of_a_step(), refused="not to be had").assert_outcome()
    with pytest.raises(AssertionError, match="what is refused is left out"):
        Program("both", of_a_step(refuse), refused="not to be had").assert_outcome()
    Program("said", of_a_step(refuse), refused="not to be had", n_samples=6).assert_outcome()


def test_an_exact_program_states_what_is_right() -> None:
    def silent(run: Run) -> None:
        model = MLP.model()
        with run.block(model):
            x, y = MLP.batch()
            numbers(model(x), y).backward()

    with pytest.raises(AssertionError, match="says what is expected"):
        Program("silent", silent).assert_outcome()
