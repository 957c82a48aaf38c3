"""How many bytes the algebra may take for its temporaries at once: as many as stay in the caches, or fewer on request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_limit: ContextVar[int | None] = ContextVar("limit", default=None)


@contextmanager
def memory_limit(max_memory: int | None) -> Iterator[None]:
    """A block in which the temporaries of one operation take at most ``max_memory`` bytes together.

    An operation takes at least one sample at a time, even if that takes more.
    """
    token = _limit.set(max_memory)
    try:
        yield
    finally:
        _limit.reset(token)


def chunk_bytes(usual: int | None) -> int | None:
    """How many bytes a chunk of temporaries may take: ``usual``, but no more than half of the limit.

    None stands for any number, in the argument and in the answer.
    """
    limit = _limit.get()
    # Two chunks may exist at once, since the result of an operation on a temporary can be as large as the temporary itself.
    limit = None if limit is None else limit // 2
    return limit if usual is None else usual if limit is None else min(usual, limit)


def chunks(n: int, bytes_per_sample: float, usual: int | None) -> Iterator[slice]:
    """Slices of 0..n, each with as many samples as fit into the budget of ``usual`` bytes or fewer, but at least one."""
    budget = chunk_bytes(usual)
    step = max(1, n if budget is None else min(n, int(budget // max(bytes_per_sample, 1))))
    return (slice(start, min(start + step, n)) for start in range(0, n, step))
