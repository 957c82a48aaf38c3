"""Blocks without the garbage collector, in which cycles of references show."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """What is freed inside is freed by reference counts alone, at once; what is left of cycles stays."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
