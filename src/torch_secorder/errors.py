"""What the library raises.

Everything derives from :class:`CurvatureError`, so one ``except`` catches every refusal. A refusal names the parameter
or module, the reason and the remedy; the alternative, a wrong number, is never returned.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from types import CodeType, FrameType

__all__ = [
    "ArgumentError",
    "BroadcastLossWarning",
    "CallError",
    "CoupledSamplesError",
    "CoverageError",
    "CurvatureError",
    "LifecycleError",
    "NonFiniteError",
    "OutOfMemoryError",
    "ReductionWarning",
    "ShapeError",
    "SkippedPassWarning",
    "SlowFallbackWarning",
    "UnsupportedError",
    "VerificationError",
]


class CurvatureError(RuntimeError):
    """Base of every error of this library."""


class ArgumentError(CurvatureError, ValueError):
    """An argument is invalid."""


class CallError(ArgumentError, TypeError):
    """A call lacks an argument, or has one that the function doesn't take."""


class UnsupportedError(CurvatureError, NotImplementedError):
    """A layer, a setting of a layer or a loss type whose exact per-sample gradient is not known here."""


class ShapeError(UnsupportedError, ValueError):
    """A tensor in which the batch axis cannot be found, or whose batch size disagrees with the rest."""


class CoupledSamplesError(UnsupportedError):
    """A module or a loss mixes the samples of a batch, so that per-sample gradients do not exist."""


class CoverageError(CurvatureError):
    """A backward pass reached a parameter in a way that no captured call accounts for."""


class LifecycleError(CurvatureError):
    """The order of calls leaves open what a sample is: nested entry, two backward passes through one forward, ..."""


class NonFiniteError(CurvatureError, ArithmeticError):
    """A gradient is infinite or not a number."""


class OutOfMemoryError(CurvatureError, MemoryError):
    """There is no memory for taking gradients apart by samples, not even for one sample at a time."""


class VerificationError(CurvatureError):
    """A sample alone, through plain autograd, has other gradients than the analysis of its batch says."""


class SkippedPassWarning(UserWarning):
    """A backward pass was refused, and left out since ``on_refusal="skip"`` asks for that."""


class BroadcastLossWarning(UserWarning):
    """A loss makes ``(N, N)`` of N outputs, as one that compares every output with every target does."""


class ReductionWarning(UserWarning):
    """A loss sums over its samples in a monitor that was told it averages, or the other way round."""


class SlowFallbackWarning(UserWarning):
    """Most of the work goes into operations without a rule, which are differentiated for one sample at a time."""


def listed(items: Sequence[object], noun: str) -> str:
    """The first few of some items in words: "sample 3", "parameters a, b, c, d, e and 2 more"."""
    shown = ", ".join(str(item) for item in items[:5])
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return f"{noun}{'s' if len(items) > 1 else ''} {shown}{more}"


def warn_at_users_line(message: str, category: type[Warning]) -> None:
    """Warn, and name the line of the user's that led here, however many calls of ours and of torch's lie in between."""
    level, _ = _users_frame()
    warnings.warn(message, category, stacklevel=level - 1)


def users_place() -> tuple[tuple[CodeType, int], ...]:
    """The place in the user's program that led here: the code of each function of theirs, and the instruction in it.

    A function that is called from several places, each with a loss of its own, is as many places.
    """
    place: list[tuple[CodeType, int]] = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if not _is_ours_or_torchs(str(frame.f_globals.get("__name__", ""))):
            place.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return tuple(place)


def _users_frame() -> tuple[int, FrameType]:
    """The innermost call that is neither ours nor torch's, and its distance from here as warnings count it."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_ours_or_torchs(str(frame.f_globals.get("__name__", ""))):
        level, frame = level + 1, frame.f_back
    return level, frame


def _is_ours_or_torchs(module: str) -> bool:
    return module.partition(".")[0] in ("torch_secorder", "torch", "contextlib")
