"""The first look at a graph whose nodes tell where samples are: one pass, which has to agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.live_bytes import LiveBytes
from oracles import assert_equal
from torch_secorder import FisherMonitor, empirical_fisher_trace
from torch_secorder.autograd.graph_pass import GraphPass
from torch_secorder.batch_axis.confirmation import PassPeaks
from torch_secorder.batch_axis.derivation import Derivation
from torch_secorder.batch_axis.evidence import Evidence, Finding, Unplaced
from torch_secorder.batch_axis.placement import Layout, Placement
from torch_secorder.batch_axis.search_pass import Viewed
from torch_secorder.testing import sample_gradients

N = 5


class Blocks(nn.Module):
    """Maps, then a sequence-first encoder, with positions that all samples share or without."""

    def __init__(self, has_positions: bool = True) -> None:
        super().__init__()
        self.stem, self.place = nn.Conv2d(2, 6, 3, padding=1), nn.Embedding(4, 6) if has_positions else None
        self.attention, self.norm = nn.MultiheadAttention(6, 2), nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(self.stem(x).relu(), 2).flatten(2).permute(2, 0, 1)
        if self.place is not None:
            h = h + self.place(torch.arange(4))[:, None]
        h = h + self.attention(self.norm(h), self.norm(h), self.norm(h), need_weights=False)[0]
        return self.head(h.mean(0))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each pass through a graph."""
    found: list[int] = []
    run = GraphPass.run

    def counted(self: GraphPass, *args: Any) -> None:
        found.append(1)
        run(self, *args)

    monkeypatch.setattr(GraphPass, "run", counted)
    return found


def batch(n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 2, 4, 4, dtype=torch.float64, generator=generator), torch.arange(n) % 3


def require_exact(monitor: FisherMonitor, model: nn.Module, x: Tensor, y: Tensor) -> None:
    gradients = sample_gradients(model, nn.CrossEntropyLoss(), x, y)
    for name, each in gradients.items():
        expected = each.flatten(1).square().sum(1)
        found = torch.from_numpy(monitor.per_sample[name].to_numpy(copy=True))[: len(x)]
        assert_equal(found, expected, monitor.trace * len(x))


@pytest.mark.parametrize("n", [2, 3, 5, 7, 40])
def test_a_first_look_is_one_pass(n: int, passes: list[int]) -> None:
    model, (x, y), counts = Blocks().double(), batch(n), []
    with FisherMonitor(model, per_sample=True) as monitor:
        for _ in range(6):
            passes.clear()
            nn.functional.cross_entropy(model(x), y).backward()
            counts.append(len(passes))
    assert counts == [1, 1, 1, 0, 1, 0]
    require_exact(monitor, model, x, y)


def require_exact_function(model: nn.Module, x: Tensor, y: Tensor) -> None:
    found = empirical_fisher_trace(model, nn.CrossEntropyLoss(), x, y)
    gradients = sample_gradients(model, nn.CrossEntropyLoss(), x, y).values()
    expected = sum(each.square().sum() for each in gradients) / len(x)
    assert_equal(found, expected, expected)


@pytest.mark.parametrize("n", [2, 5])
def test_a_function_that_checks_samples_believes_the_nodes(n: int, passes: list[int]) -> None:
    require_exact_function(Blocks(has_positions=False).double(), *batch(n))
    assert not passes


@pytest.mark.parametrize("n", [2, 5])
def test_what_samples_share_takes_a_pass_in_a_function_too(n: int, passes: list[int]) -> None:
    require_exact_function(Blocks().double(), *batch(n))
    assert len(passes) == 1


def turned(evidence: Evidence) -> Evidence:
    """Samples in the opposite order."""
    if isinstance(evidence, Placement) and evidence.layout is Layout.ONE_EACH:
        return Placement(evidence.axis, Layout.INDEXED, torch.arange(N).flip(0))
    return evidence


def all_shared(evidence: Evidence) -> Evidence:
    return Unplaced.SHARED_BY_SAMPLES


def nothing(evidence: Evidence) -> Evidence:
    return Unplaced.NO_GRADIENT


def with_wrong_findings(monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Evidence], Evidence]) -> None:
    findings = Derivation.findings

    def lied(self: Derivation, wanted: list[Viewed]) -> list[Finding]:
        return [Finding(wrong(one.evidence)) for one in findings(self, wanted) or []]

    monkeypatch.setattr(Derivation, "findings", lied)


@pytest.mark.parametrize("wrong", [turned, all_shared, nothing], ids=lambda wrong: wrong.__name__)
def test_what_a_pass_contradicts_is_looked_for(
    wrong: Callable[[Evidence], Evidence], passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_wrong_findings(monkeypatch, wrong)
    model, (x, y) = Blocks().double(), batch()
    with FisherMonitor(model, per_sample=True) as monitor:
        nn.functional.cross_entropy(model(x), y).backward()
    assert len(passes) >= 1 + 2
    require_exact(monitor, model, x, y)


@pytest.mark.parametrize("wrong", [turned, all_shared], ids=lambda wrong: wrong.__name__)
def test_a_check_of_samples_brings_the_passes(
    wrong: Callable[[Evidence], Evidence], passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_wrong_findings(monkeypatch, wrong)
    require_exact_function(Blocks(has_positions=False).double(), *batch())
    assert len(passes) >= 1 + 2


ROWS = 4
LOUD = torch.tensor([1.0, 0.0, 0.0, 1.0])
EACH, BLOCKS = Placement(), Placement(0, Layout.BLOCKS)


def rows(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None].expand(-1, 3)


@pytest.mark.parametrize(
    ("grad", "derived", "expected"),
    [
        (rows(1, 0, 0, 2), EACH, True),
        (rows(1, 0, 0, 2).T, Placement(1), True),
        (rows(1, 0, 1e-30, 2), EACH, False),  # something of a silent sample
        (rows(1, 0, 0, 0), EACH, False),  # nothing of a loud one, which shows nothing
        (rows(1, 0, 0, 1e-9), EACH, False),  # nearly nothing
        (rows(0, 0, 0, 0), EACH, False),
        (rows(1, 0, 0, float("nan")), EACH, False),
        (rows(1, 0, 0, float("inf")), EACH, False),
        (rows(1, 1, 0, 0, 0, 0, 3, 1), BLOCKS, True),
        (rows(1, 0, 0, 1, 1, 0, 0, 2), BLOCKS, False),
        (rows(1, 0, 0, 1), Placement(0, Layout.INDEXED, torch.tensor([0, 1, 2, 3])), True),
        (rows(1, 1, 2), Unplaced.SHARED_BY_SAMPLES, True),
        (rows(1, 1, 2, 1), Unplaced.SHARED_BY_SAMPLES, True),
        (rows(1, 0, 0, 1), Unplaced.SHARED_BY_SAMPLES, False),
        (rows(1, 0, 2), Unplaced.SHARED_BY_SAMPLES, False),  # some rows are no loud sample's
        (rows(1, 0, 0, 2).T, Unplaced.SHARED_BY_SAMPLES, False),  # they are on the other axis
        (torch.tensor(2.0), Unplaced.SHARED_BY_SAMPLES, True),
        (rows(0, 0, 0), Unplaced.NO_GRADIENT, True),
        (rows(0, 0, 1), Unplaced.NO_GRADIENT, False),
        (rows(1, 0, 0, 1).to(torch.complex64) * 1j, EACH, True),
        (rows(1, 0, 0, 1).bfloat16(), EACH, True),
    ],
)
def test_what_agrees(grad: Tensor, derived: Evidence, expected: bool) -> None:
    passed = PassPeaks([grad.shape], [derived], ROWS)
    passed.note(0, grad)
    (peaks,) = passed.on_the_host()
    assert peaks is not None
    assert peaks.agree(derived, tuple(grad.shape), ROWS, LOUD) is expected


def test_peaks_that_stay_are_one_pair_of_tensors() -> None:
    """A small tensor for each gradient would stay between the large ones that are freed, whose places the heap could not join."""
    derived: list[Evidence] = [EACH, BLOCKS, Unplaced.SHARED_BY_SAMPLES] * 10
    grads = [torch.randn(ROWS, 3), torch.randn(2 * ROWS, 3), torch.randn(3, ROWS)] * 10
    peaks = PassPeaks([grad.shape for grad in grads], derived, ROWS)
    with LiveBytes() as live:
        for place, grad in enumerate(grads):
            peaks.note(place, grad)
    kept = sum(1 if change > 0 else -1 for change in live.changes)
    assert len(live.changes) > len(grads)
    assert kept == 1
    found = peaks.on_the_host()
    for grad, one, own in zip(grads, derived, found, strict=True):
        assert own is not None
        for axis, rows in own.axes.items():
            assert torch.equal(rows, grad.abs().amax(1 - axis).double()), one
