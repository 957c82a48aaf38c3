"""The device is there before the first backward pass, for then autograd's engine counts the devices that it makes threads for."""

from collections.abc import Iterator

import pytest

import pretend
from torch_secorder.autograd.double_precision import has_double_precision

pretend.register()


@pytest.fixture
def _without_float64() -> Iterator[None]:
    has_double_precision.cache_clear()
    with pretend.without_float64():
        yield
    has_double_precision.cache_clear()
