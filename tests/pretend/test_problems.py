"""On the pretend device, which is the default device, every problem's numbers are those of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import pretend
from expectations import expectation
from problems import repeats
from test_differential import DRIVERS, EVERY, Step, expected, assert_close, plain, refusals_of

pretend.register()


@contextmanager
def by_default() -> Iterator[None]:
    torch.set_default_device("pretend")
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("name", [name for name in EVERY if not repeats(EVERY[name])])
@pytest.mark.parametrize("driver", DRIVERS)
def test_problem(name: str, driver: str) -> None:
    step = plain(name)
    step = replace(step, model=pretend.moved(EVERY[name].setting().model), batches=pretend.moved(step.batches))
    with by_default(), expectation(refusals_of(name).get(driver, "")):
        assert_close(DRIVERS[driver](step), expected(name), 1e-8, driver)
