"""The stance of torch's compiler is ours while steps are watched and the user's at all other times."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import eval_frame

from model_state import hooks
from monitor.compiled_programs import Program, nothing_compiled, stance
from torch_secorder import FisherMonitor
from torch_secorder.errors import LifecycleError, UnsupportedError

pytestmark = [
    pytest.mark.usefixtures(nothing_compiled.__name__),
    # torch's compiler says these while it compiles.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python"),
]


@pytest.mark.parametrize("users", ["default", "fail_on_recompile", "eager_on_recompile"])
def test_a_stance_of_the_users_is_there_between_watched_steps_and_afterwards(users: str) -> None:
    program = Program("wrapper")
    program.compile()
    program.step(0)
    inside = []
    with torch.compiler.set_stance(users):
        before = eval_frame._stance
        with FisherMonitor(program.model, every=2) as monitor:
            for number in range(3):
                inside.append(stance())
                program.step(number)
        assert eval_frame._stance is before
    assert inside == ["force_eager", users, "force_eager"]
    program.require_exact(monitor, [0, 2])


def test_an_exception_and_a_break_give_the_stance_back() -> None:
    program = Program("wrapper")
    program.compile()
    with pytest.raises(ValueError, match="own"), FisherMonitor(program.model):
        assert stance() == "force_eager"
        raise ValueError("own")
    assert stance() == "default"
    for _ in range(2):
        with FisherMonitor(program.model):
            program.step(0)
            break
    assert stance() == "default"


def test_a_monitor_is_entered_again() -> None:
    program = Program("wrapper")
    program.compile()
    program.step(0)
    monitor = FisherMonitor(program.model, every=2)
    for start in (0, 3):
        with monitor:
            for number in range(start, start + 3):
                program.step(number)
        assert stance() == "default"
    program.require_exact(monitor, [0, 2, 3, 5])


def test_two_monitors_at_once_hold_the_stance_in_turn() -> None:
    first, second = Program("wrapper"), Program("in place")
    monitors = [FisherMonitor(first.model, every=2), FisherMonitor(second.model, every=3)]
    for program in (first, second):
        program.compile()
        program.step(0)
    for monitor in monitors:  # The one that is entered first is left first.
        monitor.__enter__()
    for number in range(4):
        first.step(number)
        second.step(number)
    monitors[0].__exit__()
    second.step(4)
    monitors[1].__exit__()
    assert stance() == "default"
    first.require_exact(monitors[0], [0, 2])
    second.require_exact(monitors[1], [0, 3])


def test_a_stance_set_inside_the_block_is_the_users_and_is_refused_where_it_hides_the_model() -> None:
    program = Program("wrapper")
    program.compile()
    program.step(0)
    with FisherMonitor(program.model) as monitor:
        with torch.compiler.set_stance("default"), pytest.raises(UnsupportedError, match="a compiled function"):
            program.step(1)
        assert stance() == "force_eager"
        program.step(2)
        torch.compiler.set_stance("eager_on_recompile")
    assert stance() == "eager_on_recompile", "what was set inside stays"
    torch.compiler.set_stance("default")
    program.require_exact(monitor, [2])


def test_a_stance_set_for_a_while_that_ends_after_the_block_is_not_ours_forever() -> None:
    program = Program("wrapper")
    program.compile()
    program.step(0)
    users = None
    with FisherMonitor(program.model):
        users = torch.compiler.set_stance("default")
    users.__exit__(None, None, None)  # It puts back what it found: ours.
    assert stance() == "default"
    before = program.backend.runs
    program.step(0)
    assert program.backend.runs > before
    torch.compiler.set_stance("default")


def test_a_monitor_that_is_dropped_inside_its_block_gives_the_stance_back() -> None:
    monitor = FisherMonitor(nn.Linear(2, 2))
    monitor.__enter__()
    assert stance() == "force_eager"
    del monitor
    gc.collect()
    assert stance() == "default"


@pytest.mark.slow  # It compiles.
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_a_block_inside_of_a_compiled_function_is_refused() -> None:
    model = nn.Linear(2, 2)

    @torch.compile(backend="eager")
    def train(x: Tensor) -> Tensor:
        y = x + 1
        with FisherMonitor(model):
            return model(y).sum()

    with pytest.raises(LifecycleError, match="move the block"):
        train(torch.ones(1, 2))
    assert not any(hooks(model).values())


@pytest.mark.slow  # It starts a process.
def test_a_program_that_ends_inside_of_a_block_ends_quietly() -> None:
    """Without the compiler; test_compiled_refusals.py has a program that has imported it."""
    program = """
import torch
from torch_secorder import FisherMonitor
model = torch.nn.Linear(3, 2)
monitor = FisherMonitor(model)
monitor.__enter__()
model(torch.randn(4, 3)).sum().backward()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("", "")
