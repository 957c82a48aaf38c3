"""The dtype that the user made the default changes nothing: models and data keep theirs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from expectations import expectation
from test_differential import DRIVERS, EXACT, OTHERS, assert_close, expected, of_names, plain, refusals_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),  # re-entrant checkpoints
]


@contextmanager
def by_default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@of_names(*OTHERS[::4])
def test_some_problems(name: str) -> None:
    require_exact(name, torch.float64)


@pytest.mark.slow
@of_names(*[name for number, name in enumerate(OTHERS) if number % 4])
def test_other_problems(name: str) -> None:
    require_exact(name, torch.float64)


@pytest.mark.slow
@of_names(*OTHERS)
def test_problem_in_half_precision(name: str) -> None:
    require_exact(name, torch.bfloat16)


def require_exact(name: str, dtype: torch.dtype) -> None:
    step, right = plain(name), expected(name)
    for driver in DRIVERS:
        with by_default(dtype), expectation(refusals_of(name).get(driver, "")):
            assert_close(DRIVERS[driver](step), right, EXACT, driver)
