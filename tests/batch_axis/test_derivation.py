"""What nodes saved and what passes show, on every problem: neither contradicts the other."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from problems import AWKWARD, PROBLEMS, repeats
from torch_secorder import FisherMonitor
from torch_secorder.batch_axis.derivation import Derivation
from torch_secorder.batch_axis.evidence import Finding, Unplaced
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.batch_axis.search import SampleSearch
from torch_secorder.batch_axis.search_pass import SearchPasses, Viewed
from torch_secorder.errors import CurvatureError

# torch warns of even kernels with padding="same", and of re-entrant checkpoints at the model's inputs.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
Compared = list[tuple[Finding, Finding, Viewed]]
USED = [problem for problem in [*PROBLEMS, *AWKWARD] if not repeats(problem)]


def ends_of(roots: list[Tensor]) -> list[Any]:
    seen: set[Any] = set()
    stack = [x.grad_fn for x in roots]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [child for child, _ in node.next_functions]
    return [node for node in seen if not node.next_functions]


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Compared:
    """What was derived and what was shown, of each place that passes look at."""
    found: Compared = []
    findings = SearchPasses.findings

    def both(self: SearchPasses, wanted: list[Viewed]) -> list[Finding]:
        shown = findings(self, wanted)
        derived = Derivation(self._placed, self._n, ends_of(self._roots)).findings(wanted)
        if derived is not None:
            found.extend(zip(derived, shown, wanted, strict=True))
        return shown

    monkeypatch.setattr(SearchPasses, "findings", both)
    monkeypatch.setattr(SampleSearch, "_agreed", lambda self, *places: None)  # that passes are made to find them
    return found


@pytest.mark.slow
def test_derivation_and_passes_agree(compared: Compared) -> None:
    """And nearly all places that passes find are derived to be where they are."""
    contradictions, placed, same = [], 0, 0
    for problem in USED:
        compared.clear()
        setting = problem.setting()
        refused = False
        try:
            with FisherMonitor(setting.model):
                setting.loss().backward()
        except CurvatureError:
            refused = True  # passes may have looked before that
        n = len(setting.targets)
        for derived, shown, (_, shape) in compared:
            if contradict(derived, shown, shape, n):
                contradictions.append((problem.name, shape, derived, shown))
            if not refused and isinstance(shown.evidence, Placement):
                placed += 1
                same += isinstance(derived.evidence, Placement)
    assert not contradictions
    assert placed > 100
    assert same > 0.8 * placed, (same, placed)


def contradict(derived: Finding, shown: Finding, shape: tuple[int, ...], n: int) -> bool:
    """Whether a place was derived to be where passes show that it is not."""
    if derived.evidence is Unplaced.NO_GRADIENT:
        return shown.evidence is not Unplaced.NO_GRADIENT
    if not isinstance(derived.evidence, Placement):
        return False
    if shown.evidence is Unplaced.SHARED_BY_SAMPLES:
        return True
    return (
        isinstance(shown.evidence, Placement) and shown.proven and not derived.evidence.agrees(shown.evidence, shape, n)
    )
