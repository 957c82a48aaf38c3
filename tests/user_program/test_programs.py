"""Every program runs under a monitor as without it, to the last bit, and the monitor says what the program's data say."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from user_program.hooked import HOOKED
from user_program.inputs import INPUTS
from user_program.nested import NESTED
from user_program.observed import assert_unnoticed
from user_program.program import Program
from user_program.steps import STEPS
from user_program.wrapped import WRAPPED

PROGRAMS = [*HOOKED, *NESTED, *INPUTS, *STEPS, *WRAPPED]
assert len({program.name for program in PROGRAMS}) == len(PROGRAMS), "two programs of one name"


@pytest.fixture(scope="module", params=PROGRAMS, ids=lambda program: program.name)
def program(request: pytest.FixtureRequest) -> Iterator[Program]:
    """A program, whose two runs both tests look at."""
    yield request.param
    request.param.forget()


def test_the_program_runs_as_without_the_monitor(program: Program) -> None:
    assert_unnoticed(program.watched, program.plain)


def test_what_the_monitor_says_is_as_stated(program: Program) -> None:
    program.assert_outcome()
