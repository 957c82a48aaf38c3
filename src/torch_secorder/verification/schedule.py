"""An analysis of a batch with its check, and what happens if it does not pass."""

from __future__ import annotations

from collections.abc import Callable

from torch_secorder.errors import CurvatureError, VerificationError
from torch_secorder.running.analysis import Analysis
from torch_secorder.running.analyzed import Batch


def analyze_and_verify(analysis: Analysis, analyze: Callable[[], Batch], check: Callable[[Batch], None]) -> Batch:
    """The analysis of a batch, checked if it is due for a check.

    If it does not pass, the batch is analyzed once more, with evidence for everything that was read from shapes. One that does
    not pass either time is followed by a check of the next, as the first is.

    Args:
        analysis: the analysis of the model.
        analyze: gives the batch, with its outputs if it is to be checked.
        check: raises a VerificationError if the batch is wrong.

    Raises:
        VerificationError: if the batch does not pass either time.
    """
    batch = analyze()
    if batch.outputs is None:
        return batch
    try:
        return _checked(analysis, batch, analyze, check)
    except CurvatureError:
        analysis.restart_checks()
        raise


def _checked(analysis: Analysis, batch: Batch, analyze: Callable[[], Batch], check: Callable[[Batch], None]) -> Batch:
    try:
        check(batch)
    except VerificationError:
        if not analysis.trusts_shapes:
            raise
        analysis.forget_shapes()
        batch = analyze()
        check(batch)
    return batch
