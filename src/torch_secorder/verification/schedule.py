"""What is verified when: an analysis of a batch, and what is done if it doesn't pass."""

from __future__ import annotations

from collections.abc import Callable

from torch_secorder.errors import VerificationError
from torch_secorder.running.analysis import Analysis, Batch


def analyze_and_verify(analysis: Analysis, analyze: Callable[[], Batch], check: Callable[[Batch], None]) -> Batch:
    """The analysis of a batch, which passes the check if it is one to be checked.

    If it doesn't pass, it is made once more from evidence for all that was read from shapes.

    Args:
        analysis: what the batch is analyzed with.
        analyze: gives the batch, with its outputs if it is to be checked.
        check: raises a VerificationError if the batch is wrong.

    Raises:
        VerificationError: if the batch doesn't pass either time.
    """
    batch = analyze()
    if batch.outputs is None:
        return batch
    try:
        check(batch)
    except VerificationError:
        if not analysis.trusts_shapes:
            raise
        analysis.forget_shapes()
        batch = analyze()
        check(batch)
    return batch
