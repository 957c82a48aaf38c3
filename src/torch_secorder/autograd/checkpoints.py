"""Re-entrant activation checkpoints, which the library's own runs of a model take in their other form.

A re-entrant checkpoint starts a backward pass of its own, which gives gradients to leaves only and hides its graph. The other
form computes the same numbers from the same saved inputs, and its graph is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.utils.checkpoint
from torch import Tensor
from torch.utils.checkpoint import checkpoint


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
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve, determinism_check="none")


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
