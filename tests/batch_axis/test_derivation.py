"""What nodes saved and what passes show, on every problem: neither contradicts the other."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from problems import AWKWARD, PROBLEMS, Problem, repeats
from torch_secorder import FisherMonitor
from torch_secorder.batch_axis.derivation import Derivation
from torch_secorder.batch_axis.evidence import Finding, Unplaced
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.batch_axis.search import SampleSearch
from torch_secorder.batch_axis.search_pass import SearchPasses, Viewed
from torch_secorder.errors import CurvatureError

# torch warns of even kernels with padding="same", and of re-entrant checkpoints at the model's inputs.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
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
def compared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Finding, Finding, Viewed]]:
    """What was derived and what was shown, of each place that passes look at."""
    found: list[tuple[Finding, Finding, Viewed]] = []
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


@pytest.mark.parametrize("problem", USED, ids=str)
def test_derivation_and_passes_agree(problem: Problem, compared: list[tuple[Finding, Finding, Viewed]]) -> None:
    setting = problem.setting()
    try:
        with FisherMonitor(setting.model):
            setting.loss().backward()
    except CurvatureError:
        pass  # passes may have looked before it was refused
    n = len(setting.targets)
    for derived, shown, (_, shape) in compared:
        if derived.evidence is Unplaced.NO_GRADIENT:
            assert shown.evidence is Unplaced.NO_GRADIENT
        if not isinstance(derived.evidence, Placement):
            continue
        assert shown.evidence is not Unplaced.SHARED_BY_SAMPLES
        if isinstance(shown.evidence, Placement) and shown.proven:
            assert derived.evidence.agrees(shown.evidence, shape, n)


def test_most_of_what_passes_show_is_derived(compared: list[tuple[Finding, Finding, Viewed]]) -> None:
    """Of the problems that passes look at, nearly all places are derived to be where they are."""
    for problem in USED:
        setting = problem.setting()
        try:
            with FisherMonitor(setting.model):
                setting.loss().backward()
        except CurvatureError:
            continue
    placed = [(d, s) for d, s, _ in compared if isinstance(s.evidence, Placement)]
    same = [isinstance(derived.evidence, Placement) for derived, _ in placed]
    assert len(same) > 100
    assert sum(same) > 0.8 * len(same), (sum(same), len(same))
