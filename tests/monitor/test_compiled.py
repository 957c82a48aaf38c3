"""Compiled models: watched steps run as written and are exact, and all others run compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model_state import hooks
from monitor.compiled_programs import WAYS, N, Program, nothing_compiled, product
from oracles import assert_equal
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report, hessian_trace
from torch_secorder.pruning import Gates
from traps.exactness import numbers

pytestmark = [
    pytest.mark.usefixtures(nothing_compiled.__name__),
    # torch's compiler says these while it compiles.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python"),
]


@pytest.mark.parametrize("traces_backward", [False, True])
@pytest.mark.parametrize("how", WAYS)
def test_every_step_is_watched(how: str, traces_backward: bool) -> None:
    program = Program(how, traces_backward)
    program.compile()
    program.step(0)
    before = program.backend.counts()
    assert min(before) > 0
    with FisherMonitor(program.model) as monitor:
        for number in range(3):
            program.step(number)
            program.evaluate()
    assert program.backend.counts() == before, "nothing ran compiled inside"
    program.step(0)
    assert program.backend.compiled == before[0], "the block made nothing compile anew"
    assert program.backend.runs == 2 * before[1]
    program.require_exact(monitor, [0, 1, 2])
    assert not any(hooks(program.model).values())


@pytest.mark.parametrize("traces_backward", [False, True])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("how", WAYS)
def test_one_step_in_three_is_watched_and_the_others_are_compiled(how: str, warm: bool, traces_backward: bool) -> None:
    program = Program(how, traces_backward)
    program.compile()
    if warm:
        program.step(0)
    per_step = []
    with FisherMonitor(program.model, every=3) as monitor:
        for number in range(7):
            before = program.backend.runs
            program.step(number)
            per_step.append(program.backend.runs - before)
    compiled = program.backend.compiled
    program.step(0)
    assert program.backend.compiled == compiled, "nothing compiles anew outside"
    runs = per_step[1]
    assert runs > 0
    assert per_step == [0, runs, runs, 0, runs, runs, 0]
    program.require_exact(monitor, [0, 3, 6])
    assert not any(hooks(program.model).values())


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("how", WAYS)
def test_compiled_inside_the_block(how: str, every: int) -> None:
    program = Program(how)
    with FisherMonitor(program.model, every=every) as monitor:
        program.compile()
        for number in range(4):
            program.step(number)
    inside = program.backend.counts()
    assert (min(inside) > 0) == (every == 3)
    program.step(0)
    program.step(1)
    assert program.backend.runs > inside[1]
    assert every == 1 or program.backend.compiled == inside[0]
    program.require_exact(monitor, [0, 1, 2, 3] if every == 1 else [0, 3])


@pytest.mark.parametrize("how", WAYS)
def test_accumulation_and_evaluations_in_between(how: str) -> None:
    """Passes are counted, so that an evaluation moves nothing; it runs as the step after it."""
    program = Program(how)
    program.compile()
    program.evaluate()
    program.step(0)
    per_step = []
    with FisherMonitor(program.model, every=3, loss_scale=0.5) as monitor:
        for number in range(8):
            if number % 2 == 0:
                program.model.zero_grad()
            program.evaluate()
            before = program.backend.runs
            (program.loss(*program.batches[number]) / 2).backward()
            per_step.append(program.backend.runs - before)
            program.evaluate()
    runs = max(per_step)
    assert per_step == [0, runs, runs, 0, runs, runs, 0, runs]
    program.require_exact(monitor, [0, 3, 6])


@pytest.mark.parametrize("how", WAYS)
def test_a_watched_step_is_the_eager_step_bit_for_bit(how: str) -> None:
    program, eager = Program(how), Program(how)
    program.compile()
    program.step(0)
    eager.loss = eager._loss
    if how == "function":
        eager.model.function = product
    seen: dict[str, list[Tensor]] = {"compiled": [], "eager": []}
    for name, one in (("compiled", program), ("eager", eager)):
        one.model.block.register_forward_hook(
            lambda module, args, output, name=name: seen[name].append(output.detach())
        )
        one.model.weight.register_hook(lambda grad, name=name: seen[name].append(grad.clone()))
    with FisherMonitor(program.model, every=2) as monitor:
        program.step(1)
    eager.step(1)
    for p, q in zip(program.model.parameters(), eager.model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
    assert len(seen["compiled"]) == len(seen["eager"]) == 2
    assert all(map(torch.equal, seen["compiled"], seen["eager"]))
    program.require_exact(monitor, [1])


@pytest.mark.parametrize("how", WAYS)
def test_steps_that_are_not_watched_are_those_without_a_monitor_bit_for_bit(how: str) -> None:
    program, alone = Program(how), Program(how)
    for one in (program, alone):
        one.compile()
        one.step(0)
    with FisherMonitor(program.model, every=2):
        program.step(1)
        program.step(2)
    alone.step(2)
    for p, q in zip(program.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", WAYS)
def test_the_functions_run_the_model_as_written(how: str) -> None:
    program = Program(how)
    program.compile()
    program.step(0)
    before, (x, y) = program.backend.counts(), program.batches[0]
    expected = program.expected([0])
    model: Any = program.call if how == "wrapper" else program.model
    everything = sum(t.mean() for t in expected.values())
    assert_equal(empirical_fisher_trace(model, numbers, x, y), everything, everything)
    table = fisher_report(model, numbers, (x, y), progress=False)
    for name, t in expected.items():
        assert_equal(torch.tensor(table.loc[name, "fisher_trace"]), t.mean(), everything)
    hessian_trace(model, numbers, x, y, num_samples=2)
    assert program.backend.counts() == before


def test_functions_inside_of_a_block_do_not_have_its_passes_counted() -> None:
    """Compiled code that the library calls says nothing about the user's, whose calls go on being counted."""
    program, other = Program("none"), Program("layer")
    for one in (program, other):
        one.compile()
        one.step(0)
    with FisherMonitor(program.model, every=2) as monitor:
        for number in range(3):
            program.step(number)
            program.evaluate()
            fisher_report(other.model, numbers, other.batches[0], progress=False)
    program.require_exact(monitor, [0, 2])


def test_gates_run_the_model_as_written() -> None:
    program = Program("layer")
    program.compile()
    program.step(0)
    before = program.backend.counts()
    with Gates(program.model, modules=(nn.Linear,)) as gates:
        program.step(1)
    assert program.backend.counts() == before
    assert gates.n_samples == N


def test_a_model_that_is_not_compiled_counts_calls_whatever_else_was_compiled() -> None:
    torch.compile(product, backend="eager")(torch.ones(1, 1), torch.ones(1, 1))
    program = Program("none")
    program.compile()
    with FisherMonitor(program.model, every=2) as monitor:
        for number in range(3):
            program.step(number)
            program.evaluate()
    program.require_exact(monitor, [0, 2])
