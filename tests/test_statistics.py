"""Sums over samples: as numpy computes them from all samples at once, however they arrive."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import Tensor

from torch_secorder.errors import CurvatureError
from torch_secorder.per_sample import SquareSum
from torch_secorder.recording.quantities import Diagonal, SampleRows
from torch_secorder.recording.quantities.diagonal import DiagonalPart
from torch_secorder.recording.sample_norms import SampleNorms
from torch_secorder.results.moments import SampleMoments
from torch_secorder.results.statistics import Statistics

NAMES, SHAPES = ["a", "b", "c"], [(2,), (3, 1), ()]


def statistics(*blocks: Tensor, diagonal: bool = False, per_sample: bool = False) -> Statistics:
    """Each block [n, p] of t as one backward pass."""
    found = Statistics(NAMES, SHAPES, diagonal=diagonal, per_sample=per_sample)
    for block in blocks:
        sums = {i: torch.full(shape, float(block[:, i].sum())) for i, shape in enumerate(SHAPES)} if diagonal else {}
        parts = {"diagonal": DiagonalPart({i: [SquareSum(value, SHAPES[i])] for i, value in sums.items()})}
        found.update(
            SampleNorms(len(block), block.T, {0, 1, 2}, {0: ["rule"]}, parts),
            ([0], torch.tensor([2.0], dtype=torch.float64).sqrt()),
        )
    return found


def rows(found: Statistics) -> list[Tensor]:
    quantity = found.quantities["per_sample"]
    assert isinstance(quantity, SampleRows)
    return quantity.blocks


def totals(found: Statistics) -> list[Tensor]:
    quantity = found.quantities["diagonal"]
    assert isinstance(quantity, Diagonal)
    return quantity.totals


def assert_moments(found: Statistics, t: Tensor) -> None:
    assert found.n == len(t)
    np.testing.assert_allclose(found.mean.numpy(), t.numpy().mean(0), rtol=1e-12)
    for positions in ([0], [1], [0, 2], [0, 1, 2]):
        expected = t[:, positions].sum(1).numpy().var(ddof=1)
        assert found.squared_norms.variance_of_sum(positions) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("sizes", [[7], [1, 6], [3, 1, 1, 2]], ids=str)
def test_blocks_of_any_size_are_one_sample(sizes: list[int]) -> None:
    t = torch.rand(7, 3, dtype=torch.float64)
    assert_moments(statistics(*t.split(sizes)), t)


def test_merging_is_exact_in_any_grouping() -> None:
    t = torch.rand(9, 3, dtype=torch.float64)
    one, two, three = (statistics(part, diagonal=True, per_sample=True) for part in t.split([4, 3, 2]))
    two.merge(three)
    one.merge(two)
    assert_moments(one, t)
    assert one.passes == 3
    assert one.gradients.inverse_batch_sizes == pytest.approx(1 / 4 + 1 / 3 + 1 / 2)
    assert torch.equal(torch.cat(rows(one)), t)
    assert [tuple(s.shape) for s in totals(one)] == SHAPES


def test_a_small_spread_around_a_large_mean_is_not_lost() -> None:
    t = 1e9 + torch.rand(1000, 3, dtype=torch.float64)
    found = statistics(*t.split(7))
    assert found.squared_norms.variance_of_sum([0]) == pytest.approx(float(t[:, 0].var()), rel=1e-6)


def test_one_sample_has_no_variance() -> None:
    assert np.isnan(statistics(torch.rand(1, 3)).squared_norms.variance_of_sum([0]))


def test_the_state_survives_a_file_and_shares_nothing() -> None:
    t = torch.rand(9, 3, dtype=torch.float64)
    found, restored = (
        statistics(t, diagonal=True, per_sample=True),
        Statistics(NAMES, SHAPES, diagonal=True, per_sample=True),
    )
    file = io.BytesIO()
    torch.save(found.state_dict(), file)
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert_moments(restored, t)
    state = found.state_dict()
    state["mean"].zero_()
    state["rows"][0].zero_()
    assert_moments(found, t)
    assert torch.equal(rows(found)[0], t)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"version": 99}, r"version 99"),
        ({"names": ["a", "b", "d"]}, r"different parameters.* c$"),
        ({"shapes": [[2], [3, 2], []]}, r"b has shape \(3, 1\) here and \(3, 2\)"),
    ],
    ids=str,
)
def test_a_state_that_does_not_fit_changes_nothing(damage: dict[str, object], message: str) -> None:
    t = torch.rand(9, 3, dtype=torch.float64)
    found = statistics(t)
    with pytest.raises(CurvatureError, match=message):
        found.load_state_dict({**found.state_dict(), **damage})
    with pytest.raises(CurvatureError, match="moments"):
        found.load_state_dict({key: value for key, value in found.state_dict().items() if key != "moments"})
    assert_moments(found, t)


@pytest.mark.parametrize(("begun", "left"), [(False, 5), (True, 0)])
def test_an_interruption_costs_earlier_samples_only_if_their_squares_are_half_changed(
    monkeypatch: pytest.MonkeyPatch, begun: bool, left: int
) -> None:
    found = statistics(torch.rand(5, 3), diagonal=True)
    owner, method = (SquareSum, "added") if begun else (SampleMoments, "add")
    original = getattr(owner, method)

    def interrupted(*args: object) -> None:
        original(*args)
        raise KeyboardInterrupt

    parts = {"diagonal": DiagonalPart({0: [SquareSum(torch.ones(2), (2,))]})}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, method, interrupted)
        found.update(SampleNorms(2, torch.rand(3, 2), {0}, {}, parts))
    assert found.n == left
    assert bool(totals(found)) == (left > 0)


def test_large_numbers_whose_sum_overflows_are_finite() -> None:
    """The sum of all numbers tells of NaN and infinity at once, and may be infinite itself where none of them is."""
    large = torch.full((3, 2), 3e38)
    samples = SampleNorms(2, large, {0, 1, 2}, {})
    assert samples.finite(NAMES, "raise") is samples
    found = statistics(torch.rand(2, 3, dtype=torch.float64))
    norms = torch.full((3,), 1.2e154, dtype=torch.float64)  # the squares are finite in float64, and their sum is not
    found.gradients.add([0, 1, 2], norms.square(), 2)
    assert found.gradients.passes == 2
    found.gradients.add([0], torch.tensor([float("inf")], dtype=torch.float64), 2)
    found.gradients.add([0], torch.tensor([float("nan")], dtype=torch.float64), 2)
    assert found.gradients.passes == 2


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_one_sample_that_is_not_finite_is_found(bad: float) -> None:
    norms = torch.ones(3, 4)
    norms[1, 2] = bad
    samples = SampleNorms(4, norms, {0, 1, 2}, {})
    with pytest.raises(CurvatureError, match="sample 2 are not finite, in parameter b"):
        samples.finite(NAMES, "raise")
    assert samples.finite(NAMES, "skip").skipped == 1


def test_what_later_passes_reach_is_noted_also_after_clearing() -> None:
    t = torch.rand(3, 2, dtype=torch.float64)
    found = Statistics(NAMES, SHAPES)
    for reached, expected in (({0}, [True, False, False]), ({0, 2}, [True, False, True])):
        found.update(SampleNorms(2, t, reached, {}))
        assert found.reached.tolist() == expected
    other = Statistics(NAMES, SHAPES)
    other.load_state_dict(found.state_dict())
    other.update(SampleNorms(2, t, {1}, {}))
    assert other.reached.tolist() == [True, True, True]
    found.clear()
    found.update(SampleNorms(2, t, {2}, {}))
    assert found.reached.tolist() == [False, False, True]
