"""Where pieces, stems, heads, losses and ways are entered by decorators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry:
    """A function by its name, and what is expected of it."""

    name: str
    make: Callable[..., Any]
    coupled: bool = False  # It mixes samples, so that a refusal is right.
    needs: str = ""  # Of a loss or a way: the kind of output that it reads. Of a head: what it returns.


PIECES: dict[str, Entry] = {}
STEMS: dict[str, Entry] = {}
HEADS: dict[str, Entry] = {}
LOSSES: dict[str, Entry] = {}
WAYS: dict[str, Entry] = {}


def _entered(table: dict[str, Entry], **facts: Any) -> Callable[[F], F]:
    def enter(function: F) -> F:
        assert function.__name__ not in table, f"two entries are named {function.__name__}"
        table[function.__name__] = Entry(function.__name__, function, **facts)
        return function

    return enter


def piece(*, coupled: bool = False) -> Callable[[F], F]:
    """Enters a function from a `Site` to a `Part` from `[n, t, d]` to the same shape."""
    return _entered(PIECES, coupled=coupled)


def stem() -> Callable[[F], F]:
    """Enters a function from a `Site` to a `Part` from the model's input `[n, t, d]` to `[n, t, d]`."""
    return _entered(STEMS)


def head(outputs: str) -> Callable[[F], F]:
    """Enters a function from a `Site` to a `Part` that returns "pooled" `[n, 3]`, "tokens" `[n, t, 3]`, or "both"."""
    return _entered(HEADS, needs=outputs)


def loss(reads: str, *, coupled: bool = False) -> Callable[[F], F]:
    """Enters a function from outputs and targets to the loss and the shares `[n]` that it consists of."""
    return _entered(LOSSES, needs=reads, coupled=coupled)


def way(reads: str = "") -> Callable[[F], F]:
    """Enters a function that runs a problem by one way into the library, and raises `Wrong`."""
    return _entered(WAYS, needs=reads)
