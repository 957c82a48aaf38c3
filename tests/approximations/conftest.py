"""What several files of this folder share."""

from __future__ import annotations

import pytest

from torch_secorder.running.graph_backward import GraphBackward


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each backward pass whether it ends at the last layer."""
    found: list[bool] = []
    backward = GraphBackward.backward

    def noted(self: GraphBackward, *args: object, end: object = None, **options: object) -> object:
        found.append(end is not None)
        return backward(self, *args, end=end, **options)  # type: ignore[arg-type]  # The options are those of any pass.

    monkeypatch.setattr(GraphBackward, "backward", noted)
    return found
