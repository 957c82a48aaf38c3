"""On the pretend device, which is the default device, every problem's numbers are those of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import pretend
from expectations import expectation
from test_differential import DRIVERS, EVERY, OTHERS, assert_close, expected, of_names, plain, refusals_of

pretend.register()
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),  # re-entrant checkpoints
]

@contextmanager
def by_default() -> Iterator[None]:
    torch.set_default_device("pretend")
    try:
        yield
    finally:
        torch.set_default_device(None)


@of_names(*OTHERS)
@pytest.mark.parametrize("driver", DRIVERS)
def test_problem(name: str, driver: str) -> None:
    step, right = plain(name), expected(name)
    step = replace(step, model=pretend.moved(EVERY[name].setting().model), batches=pretend.moved(step.batches))
    with by_default(), expectation(refusals_of(name).get(driver, "")):
        assert_close(DRIVERS[driver](step), right, 1e-8, driver)
