"""What a GPU would have done: kernels launched, and waits of the host with the lines that asked for them."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pretend import copies
from pretend.memory import peak_of

LIBRARY = "/torch_secorder/"


@dataclass
class Counts:
    """What happened inside of a block, on all devices and in all threads.

    Attributes:
        launches: the kernels by operation.
        waits: how often the host waited, by what for.
        places: the same by operation and the line of the library that asked, "user" if none did.
        peak: the most bytes that were in use at once on one device, over those at the beginning.
    """

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)
    peak: int = 0


_lock = threading.Lock()
_open: list[Counts] = []


@contextmanager
def counting() -> Iterator[Counts]:
    """Count what happens inside of the block."""
    counts = Counts()
    with peak_of() as peak:
        _open.append(counts)
        try:
            yield counts
        finally:
            _open.remove(counts)
            counts.peak = peak()


def launched(name: str, kernels: int = 1) -> None:
    """So many kernels were launched for an operation, which may be none."""
    if not kernels:
        return
    with _lock:
        for counts in _open:
            counts.launches[name] += kernels


def waited(name: str) -> None:
    """The host waited for the device: all that was queued is done, copies to the host included."""
    copies.deliver()
    place = _place() if _open else ""
    with _lock:
        for counts in _open:
            counts.waits[name] += 1
            counts.places[f"{name} {place}"] += 1


def _place() -> str:
    """The innermost line of the library on the stack of this thread."""
    frame = sys._getframe(2)
    while frame is not None:
        _, library, file = frame.f_code.co_filename.partition(LIBRARY)
        if library:
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "user"
