"""Which forward and backward passes are under way, and whose: the user's, or those that the library adds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import get_ident

import torch
from torch import Tensor

from torch_secorder.hooks import at_last

current_backward: Callable[[], int] = torch._C._current_graph_task_id  # -1 outside of any backward pass

# Backward passes under way that the library itself started to see where samples are. They go through the user's graph,
# where hooks of other monitors may be; device threads run them too, so this can't be a thread's own.
PROBES: set[int] = set()

# Where the library calls a model itself: threads, and backward passes under way. That is not for the user's monitors to see.
CALLERS: set[int] = set()
PASSES: set[int] = set()


@contextmanager
def own_call() -> Iterator[None]:
    """Calls of models inside are the library's own."""
    if get_ident() in CALLERS:
        yield
        return
    with at_last(partial(CALLERS.discard, get_ident())):
        CALLERS.add(get_ident())
        yield


def calling() -> bool:
    """Whether the forward under way is not the user's."""
    return get_ident() in CALLERS or (bool(PASSES) and current_backward() in PASSES)


@contextmanager
def probe(roots: Sequence[Tensor], passes: set[int] = PROBES) -> Iterator[list[Tensor]]:
    """Copies of the roots, from which backward passes inside are the library's own."""
    copies, mine = [x.view_as(x) for x in roots], set[int]()

    def begun(grads: object) -> None:
        mine.add(current_backward())
        passes.update(mine)

    for root in copies:
        assert root.grad_fn is not None
        # Nodes of our own run before all others, so that no monitor of this model takes the pass for the user's.
        root.grad_fn.register_prehook(begun)
    try:
        yield copies
    finally:
        passes.difference_update(mine)


@contextmanager
def own_pass(roots: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Copies of what the library's own call of a model returned, to differentiate inside."""
    with own_call(), probe(roots, PASSES) as copies:
        yield copies


def probing() -> bool:
    """Whether the backward pass under way is not the user's."""
    return bool(PROBES) and current_backward() in PROBES


def own(task: int) -> bool:
    """Whether this backward pass, which is under way, is the library's own in any way."""
    return task in PROBES or task in PASSES or get_ident() in CALLERS


def at_the_end(callback: Callable[[], None]) -> None:
    """Call back when the backward pass under way is over."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def raise_at_the_end(error: Exception) -> None:
    """Raise behind whatever else waits for the end of this pass, DistributedDataParallel's reduction for one."""

    def raising() -> None:
        raise error

    at_the_end(raising)
