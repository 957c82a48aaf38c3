"""How many bytes the algebra may take for its temporaries at once: what stays in the caches, or less if somebody says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_limit: ContextVar[int | None] = ContextVar("limit", default=None)


@contextmanager
def memory_limit(max_memory: int | None) -> Iterator[None]:
    """Inside, temporaries of one operation take at most so many bytes together, where they can be cut that small."""
    token = _limit.set(max_memory)
    try:
        yield
    finally:
        _limit.reset(token)


def chunk_bytes(usual: int | None) -> int | None:
    """The bytes for temporaries where ``usual`` of them are best (None: any number), and not more than the limit."""
    limit = _limit.get()
    # What is computed from a temporary may be as large as it, and the one before it still there.
    limit = None if limit is None else limit // 2
    return limit if usual is None else usual if limit is None else min(usual, limit)
