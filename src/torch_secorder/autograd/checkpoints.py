"""Activation checkpoints in the library's own runs of a model.

A re-entrant checkpoint starts a backward pass of its own, which gives gradients to leaves only and hides its graph. The other
form computes the same numbers from the same saved inputs, and its graph is there; the library's runs take that one. Where the
result is to be differentiated, they take none: the forward would run again in a later pass of the user's, when parameters that
are not analyzed require gradients and the library's hooks are gone, so that it saves other tensors than the first time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any

import torch.utils.checkpoint
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Threads in which checkpoints are left out.
_PLAIN: set[int] = set()
_CHANGE = Lock()
_USUAL: Any = torch.utils.checkpoint._checkpoint_without_reentrant_generator


class InTheOtherForm:
    """What stands in the place of torch's function while some thread runs a model for the library.

    Args:
        usual: the function that was there, whose answer all other threads get.
        is_library_call: whether the call under way is one of the library's.
    """

    def __init__(self, usual: Any, is_library_call: Callable[[], bool]):
        self.usual, self._is_library_call = usual, is_library_call

    def apply(self, function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        """Run a checkpoint: in the other form for the library, and by torch's function for everybody else.

        A checkpoint none of whose inputs needs a gradient has outputs that need none, in either form. Torch's function warns of
        that. In the library's runs it is no mistake, since parameters that are not analyzed are frozen meanwhile.
        """
        if not self._is_library_call():
            return self.usual.apply(function, preserve, *args)
        if not (torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)):
            with torch.no_grad():
                return function(*args)
        if get_ident() in _PLAIN:
            return function(*args)
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve, determinism_check="none")


@contextmanager
def without_checkpoints() -> Iterator[None]:
    """Inside, this thread runs what is checkpointed as if it were not, in the library's own calls of a model."""
    thread = get_ident()
    with _CHANGE:
        _PLAIN.add(thread)
        torch.utils.checkpoint._checkpoint_without_reentrant_generator = _around_forward
    try:
        yield
    finally:
        with _CHANGE:
            _PLAIN.discard(thread)
            if not _PLAIN:
                torch.utils.checkpoint._checkpoint_without_reentrant_generator = _USUAL


def _around_forward(*args: Any, **kwargs: Any) -> Iterator[None]:
    """What runs before and after the forward of a checkpoint: nothing in threads that leave checkpoints out."""
    return (None for _ in range(1)) if get_ident() in _PLAIN else _USUAL(*args, **kwargs)


def put_in_place(is_library_call: Callable[[], bool]) -> None:
    """Have checkpoints that the library's calls of a model reach take the other form; safe when done twice."""
    usual = torch.utils.checkpoint.CheckpointFunction
    if not isinstance(usual, InTheOtherForm):
        torch.utils.checkpoint.CheckpointFunction = InTheOtherForm(usual, is_library_call)  # type: ignore[misc, assignment]  # It is no class.


def put_back() -> None:
    """Undo that; safe when done twice."""
    current: Any = torch.utils.checkpoint.CheckpointFunction
    if isinstance(current, InTheOtherForm):
        torch.utils.checkpoint.CheckpointFunction = current.usual  # type: ignore[misc]  # It is torch's own class again.
