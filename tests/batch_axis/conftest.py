"""What the tests of this folder share: how often marks are sent through a graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from torch_secorder.batch_axis.search_pass import SearchPasses, Viewed


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that marks are sent through a graph."""
    made: list[int] = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(self: SearchPasses, wanted: list[Viewed], *rest: Any) -> Any:
            made.append(len(wanted))
            return function(self, wanted, *rest)

        return run

    # Where labels tell where all samples are, one pass agrees with them or not; else powers of two are sent.
    for name in ("agreeing", "findings"):
        monkeypatch.setattr(SearchPasses, name, counted(getattr(SearchPasses, name)))
    return made
