"""What the tests of this folder share: how often marks are sent through a graph."""

from __future__ import annotations

import pytest

from torch_secorder.batch_axis.search_pass import SearchPasses, Viewed


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that marks are sent through a graph."""
    made: list[int] = []
    findings = SearchPasses.findings

    def counted(self: SearchPasses, wanted: list[Viewed]) -> object:
        made.append(len(wanted))
        return findings(self, wanted)

    monkeypatch.setattr(SearchPasses, "findings", counted)
    return made
