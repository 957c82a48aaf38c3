"""Blocks without the garbage collector, in which cycles of references show."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


def keep_from_the_collector() -> None:
    """Collect what is garbage, and let no later collection go through what is not, which takes up to two seconds each time."""
    gc.collect()
    gc.freeze()


@contextmanager
def uncollected() -> Iterator[None]:
    """What is freed inside is freed by reference counts alone, at once; what is left of cycles stays."""
    keep_from_the_collector()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
