"""The functions that run a model themselves leave the program's own graphs, hooks, gradients and random numbers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_secorder import empirical_fisher_trace, fisher_report, generalized_fisher_trace, hessian_trace
from traps.exactness import numbers
from user_program.hooks import (
    Hooked,
    all_hooks,
    full_backward_hooks,
    layers,
    module_forward_hooks,
    parameter_hooks,
    post_accumulate_hooks,
    tensor_hooks,
)
from user_program.nested import BODIES, nothing
from user_program.nested import subject as recomputing
from user_program.observed import Run, assert_unnoticed, observed
from user_program.subjects import MLP, REORDERED, SQUARE, WINDOWS, Subject

Way = Callable[[nn.Module, Tensor, Tensor], Any]  # of a model and a batch


def of_outputs(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Any:
    return generalized_fisher_trace(model, model(x), None, "mse", **options)


def hessian(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    return hessian_trace(model, numbers, x, y, num_samples=1, generator=torch.Generator().manual_seed(0))


WAYS: dict[str, Way] = {
    "empirical": lambda model, x, y: empirical_fisher_trace(model, numbers, x, y),
    "empirical, differentiable": lambda model, x, y: empirical_fisher_trace(model, numbers, x, y, create_graph=True),
    "report": lambda model, x, y: fisher_report(model, numbers, (x, y), progress=False, verify=False),
    "verified report": lambda model, x, y: fisher_report(model, numbers, (x, y), progress=False),
    "exact report": lambda model, x, y: fisher_report(
        model, None, (x, None), fisher="exact", loss_type="mse", progress=False
    ),
    "generalized": of_outputs,
    "generalized, sampled": lambda model, x, y: of_outputs(
        model, x, y, num_samples=1, generator=torch.Generator().manual_seed(0)
    ),
    "hessian": hessian,
}
UNVERIFIED = ["report", "generalized", "generalized, sampled"]
of_ways = pytest.mark.parametrize("way", WAYS)


def beside(way: Way, subject: Subject) -> Callable[[Run], None]:
    """A call between the forward and the backward pass of a step of the program's own."""

    def program(run: Run) -> None:
        model = subject.model()
        run.look_at(model)
        x, y = subject.batch()
        with run.step():
            loss = numbers(with_hooks_in_its_graph(run, model)(x), y)
            if run.watched:
                way(model, x, y)
            loss.backward()

    return program


def with_hooks_in_its_graph(run: Run, model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A forward whose graph has every kind of hook; the model has those on its parameters afterwards."""

    def forward(x: Tensor) -> Tensor:
        all_hooks(run, model)
        outputs = model(x)
        for _, layer in layers(model):
            layer._forward_hooks.clear()
            layer._forward_pre_hooks.clear()
        run.calls.clear()
        return outputs

    return forward


@of_ways
@pytest.mark.parametrize("subject", [MLP, WINDOWS, SQUARE, REORDERED], ids=lambda subject: subject.name)
def test_a_call_beside_the_programs_own_step(way: str, subject: Subject) -> None:
    program = beside(WAYS[way], subject)
    assert_unnoticed(observed(program, watched=True), observed(program, watched=False))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("way", ["empirical", "report", "exact report", "generalized"])
def test_a_model_with_passes_inside_of_passes_keeps_its_gradients(way: str, body: str) -> None:
    """Such a Function writes .grad itself, in a pass of the library's own too: that is put back, or the model is refused."""

    def program(run: Run) -> None:
        subject = recomputing(body)
        model = subject.model()
        run.look_at(model)
        x, y = subject.batch()
        with run.step():
            numbers(model(x), y).backward()
        with run.step():
            if run.watched:
                WAYS[way](model, x, y)

    watched, plain = observed(program, watched=True), observed(program, watched=False)
    watched.warnings = plain.warnings = []  # torch's own, of re-entrant checkpoints
    assert_unnoticed(watched, plain)


def on_the_users_outputs(run: Run) -> None:
    """The generalized trace of outputs that the program has, and differentiates itself later."""
    model = MLP.model()
    run.look_at(model)
    x, y = MLP.batch()
    with run.step():
        outputs = with_hooks_in_its_graph(run, model)(x)
        if run.watched:
            generalized_fisher_trace(model, outputs, None, "mse")
        numbers(outputs, y).backward()


def test_hooks_in_the_graph_of_given_outputs_do_not_run() -> None:
    assert_unnoticed(observed(on_the_users_outputs, watched=True), observed(on_the_users_outputs, watched=False))


def called(way: str, subject: Subject, hooked: Hooked) -> Callable[[Run], None]:
    """A call, or where the library isn't used one plain forward and backward pass that leaves .grad alone."""

    def program(run: Run) -> None:
        model = subject.model().train()
        run.look_at(model)
        x, y = subject.batch()
        hooked(run, model)
        if run.watched:
            WAYS[way](model, x, y)
        else:
            differentiable = way.endswith("differentiable")  # such gradients require a gradient themselves
            torch.autograd.grad(numbers(model(x), y), list(model.parameters()), create_graph=differentiable)

    return program


DROPOUT = Subject("dropout", lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)), (6, 4))


@of_ways
def test_random_numbers_are_drawn_as_by_one_plain_forward(way: str) -> None:
    program = called(way, DROPOUT, nothing)
    assert_unnoticed(observed(program, watched=True), observed(program, watched=False))


@of_ways
def test_forward_hooks_see_the_programs_own_data(way: str) -> None:
    """The batch first, as in a plain forward; then, where samples are checked, one of them alone."""
    program = called(way, MLP, module_forward_hooks)
    watched, plain = observed(program, watched=True), observed(program, watched=False)
    assert watched.calls[: len(plain.calls)] == plain.calls
    batch = plain.calls[0][1][0][0].tensor
    for name, values in watched.calls:
        if name == "the forward pre-hook on 0":
            given = values[0][0].tensor
            assert any(torch.equal(given, own) for own in (batch, *batch.split(1)))


@pytest.mark.parametrize("way", UNVERIFIED)
@pytest.mark.parametrize("hooked", [tensor_hooks, full_backward_hooks], ids=["tensor hooks", "full backward hooks"])
def test_hooks_of_the_model_see_gradients_of_its_loss_only(way: str, hooked: Hooked) -> None:
    """Where a hook on the model runs in a pass of the library's own, it gets what it would get in the program's."""
    program = called(way, MLP, hooked)
    own = set(observed(program, watched=False).calls)
    foreign = Counter(name for name, values in observed(program, watched=True).calls if (name, values) not in own)
    assert not foreign


@of_ways
def test_hooks_on_parameters_do_not_run(way: str) -> None:
    """Nothing is accumulated, so that no hook on what is accumulated has anything to see."""

    def program(run: Run) -> None:
        model = MLP.model()
        run.look_at(model)
        x, y = MLP.batch()
        parameter_hooks(run, model)
        post_accumulate_hooks(run, model)
        if run.watched:
            WAYS[way](model, x, y)

    assert_unnoticed(observed(program, watched=True), observed(program, watched=False))
