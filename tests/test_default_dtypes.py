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


SINGLE = 1e-4  # relative, as DESIGN says what "equal" means in float32


@contextmanager
def by_default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@of_names(*OTHERS)
def test_half_precision_by_default(name: str) -> None:
    """A number that is made without a dtype loses its digits. The monitor goes by modules, and observed labels by the graph.

    The report and the other function run what a monitor runs, and are tried with every fourth problem.
    """
    step, right = plain(name), expected(name)
    for driver in DRIVERS if name in OTHERS[::4] else ("monitor", "observed"):
        with by_default(torch.bfloat16), expectation(refusals_of(name).get(driver, "")):
            assert_close(DRIVERS[driver](step), right, EXACT, driver)


@of_names(*OTHERS[::4])
def test_double_precision_by_default(name: str) -> None:
    """A number that is made without a dtype does not fit the model's, or makes its numbers wider."""
    step, right = plain(name, torch.float32), expected(name)
    for driver in DRIVERS:
        with by_default(torch.float64), expectation(refusals_of(name).get(driver, "")):
            assert_close(DRIVERS[driver](step), right, SINGLE, driver)
