"""Errors from the library's own work on a user's batch, turned into refusals that say what to do."""

from __future__ import annotations

import sys
import traceback

from torch_secorder.autograd.engine import (
    is_capturing,
    is_selective_checkpoints,
    selective_checkpoint,
    step_in_a_cuda_graph,
)
from torch_secorder.errors import CurvatureError, UnsupportedError
from torch_secorder.per_sample import as_refusal

# The top-level packages whose code is neither the user's nor that of a package which the user's model calls.
_NOT_THEIRS = {"torch_secorder", "torch", *sys.stdlib_module_names}


def refusal_of(error: Exception, what: str) -> Exception:
    """The error itself if it is a refusal or comes from the user's code; otherwise a refusal whose cause it is.

    Args:
        error: the error that was raised.
        what: what the library was about to do, in words.
    """
    refusal = as_refusal(error)
    if is_selective_checkpoints(error):
        refusal = selective_checkpoint()
        refusal.__cause__ = error
    if is_capturing():
        refusal = step_in_a_cuda_graph()
        refusal.__cause__ = error
    if isinstance(refusal, CurvatureError) or _is_theirs(error):
        return refusal
    found = UnsupportedError(
        f"{what} raised {type(error).__name__} ({str(error)[:200]}), so that this batch is left out: the library does not know "
        "this kind of tensor or layer yet; freeze it (requires_grad_(False)), or teach the library the layer with "
        "torch_secorder.register_rule"
    )
    found.__cause__ = error
    return found


def _is_theirs(error: Exception) -> bool:
    """Whether an error comes from the user's code, such as a rule or the backward of a function."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_globals.get("__name__", "").partition(".")[0] not in _NOT_THEIRS for frame in frames)
