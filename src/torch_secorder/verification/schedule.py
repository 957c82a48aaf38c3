"""When an analysis is verified, and what happens if it fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch_secorder.errors import VerificationError
from torch_secorder.running.analysis import Analysis, Batch


def analyse_and_verify(
    analysis: Analysis,
    analyse: Callable[[], Batch],
    check: Callable[[Batch], None],
    function: Callable[..., Any] | None = None,
) -> Batch:
    """The analysis of a batch that passes the check, if need be with evidence for what was read from shapes first.

    For the same function and graphs of the same structure, the check is made at the 1st, 2nd, 3rd, 5th, 9th, ... batch.

    Raises:
        VerificationError: if that doesn't pass either.
    """
    batch = analyse()
    ranks = analysis.table.ranks
    if function is not None and not ranks.max_over_ranks(analysis.memory.due(function, batch.structure)):
        return batch
    try:
        check(batch)
    except VerificationError:
        if not analysis.trusting:
            raise
        analysis.distrust()
        batch = analyse()
        check(batch)
    return batch
