"""Every comparison of the checks: what it lets pass, what it doesn't, and that NaN never passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from torch_secorder.autograd.product_bits import BF16, DOUBLE, SINGLE, TF32
from torch_secorder.batch_axis.evidence import Finding, Unplaced, evidence
from torch_secorder.batch_axis.marks import sample_marks
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.batch_axis.samples import BatchSamples
from torch_secorder.batch_axis.silence import loud_samples
from torch_secorder.batch_axis.sketch import Sketch
from torch_secorder.errors import CoverageError, VerificationError
from torch_secorder.model.ranks import Ranks
from torch_secorder.recording.batch import Projection
from torch_secorder.verification.comparison import require_equal_norms, rounding_beside_others, unequal_norms
from torch_secorder.verification.gradient_sums import unexplained_gradients
from torch_secorder.verification.separable_loss import require_separable

NOT_NUMBERS = [math.nan, math.inf, -math.inf]


def row(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


# One sample in its batch and alone


@pytest.mark.parametrize("bits", [DOUBLE, SINGLE, TF32, BF16])
@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_norm_that_is_no_number_passes(bits: int, value: float, dtype: torch.dtype) -> None:
    """Not even beside another one, and it hides no other parameter's mistake."""
    right, spoilt = row(1.0, 2.0, 3.0, dtype=dtype), row(1.0, value, 3.0, dtype=dtype)
    for in_batch, alone in ((right, spoilt), (spoilt, right), (spoilt, spoilt)):
        assert unequal_norms(in_batch, alone, bits=bits) == [1]
    assert unequal_norms(row(5.0, 2.0, 3.0, dtype=dtype), spoilt, bits=bits) == [0, 1]
    assert unequal_norms(right, right, bits=bits, rounding=torch.full((3,), math.nan)) == [0, 1, 2]


@pytest.mark.parametrize(("bits", "relative"), [(DOUBLE, 1e-6), (SINGLE, 1e-3), (TF32, 5e-2), (BF16, 5e-2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_norms_may_differ_by_rounding_and_no_more(dtype: torch.dtype, bits: int, relative: float) -> None:
    """Whatever dtype they are kept in: those of an accelerator go to the host in float64."""
    alone = row(30.0, 100.0)
    for sign in (-1, 1):
        assert unequal_norms((alone * (1 + 0.8 * sign * relative)).to(dtype), alone, bits=bits) == []
        assert unequal_norms((alone * (1 + 3 * sign * relative)).to(dtype), alone, bits=bits) == [0, 1]


def test_rounding_that_is_known_is_allowed_for() -> None:
    assert unequal_norms(row(1.0, 2.0), row(1.1, 2.0), bits=DOUBLE) == [0]
    assert unequal_norms(row(1.0, 2.0), row(1.1, 2.0), bits=DOUBLE, rounding=row(0.2, 0.0)) == []


@pytest.mark.parametrize(("bits", "small"), [(DOUBLE, 1e-14), (SINGLE, 1e-9)])
def test_nothing_at_all_is_no_small_number(bits: int, small: float) -> None:
    """A norm that is exactly zero in the batch was left out, unless autograd finds no more than rounding."""
    assert unequal_norms(row(2 * small, 1.0), row(small, 1.0), bits=bits) == []
    assert unequal_norms(row(0.0, 1.0), row(small, 1.0), bits=bits) == [0]
    assert unequal_norms(row(0.0, 1.0), row(small**2, 1.0), bits=bits) == []


@pytest.mark.parametrize(("bits", "rounding"), [(DOUBLE, 1e-24), (SINGLE, 1e-14), (TF32, 0.0), (BF16, 0.0)])
def test_what_is_only_rounding_beside_other_samples(bits: int, rounding: float) -> None:
    """A sample whose gradient cancels has nothing of its own to tell how large the terms were."""
    norms = torch.tensor([[rounding, 3.0, math.nan], [0.0, 4.0, 1.0]])
    allowed = rounding_beside_others(norms, bits=bits)
    assert 100 * rounding <= allowed <= 1e5 * rounding
    assert unequal_norms(norms[:, 0], torch.zeros(2), bits=bits, rounding=allowed) == []
    assert unequal_norms(row(1e-9, 0.0), torch.zeros(2), bits=bits, rounding=allowed) == [0]
    assert rounding_beside_others(norms[:, 2:], bits=bits) == 0


def test_the_error_names_parameters_numbers_and_the_sample() -> None:
    names = [f"layer.{i}" for i in range(12)]
    require_equal_norms(names, torch.ones(12), torch.ones(12), bits=SINGLE)
    with pytest.raises(VerificationError) as raised:
        require_equal_norms(names, torch.ones(12), 2 * torch.ones(12), bits=SINGLE, sample=7)
    text = str(raised.value)
    assert "sample 7" in text
    assert "layer.7: 1 in its batch, 2 alone" in text
    assert "layer.8" not in text
    assert "and 4 more" in text
    assert "verify=False" in text


# The captured sums and autograd's gradients


def captured_along(along: float, size: float = 1.0, dtype: torch.dtype = torch.float64) -> Projection:
    return Projection(row(along)[0], size, dtype)


def explained(
    along: float, actual: float, *, size: float = 1.0, half: bool = False, dtype: torch.dtype = torch.float64
) -> bool:
    captured = {0: [captured_along(along, size, dtype)], 1: [captured_along(1.0)]}
    found = unexplained_gradients(captured, {0: row(actual)[0], 1: row(1.0)[0]}, torch.ones(2, 1), half)
    assert found in ([], [0])
    return not found


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_no_sum_that_is_no_number_passes(half: bool, value: float) -> None:
    assert explained(1.0, 1.0, half=half)
    assert not explained(value, 1.0, half=half)
    assert not explained(1.0, value, half=half)
    assert not explained(value, value, half=half)
    assert not explained(1.0, 1.0, size=math.nan, half=half)
    assert not explained(1.0, 2.0, size=math.inf, half=half)


def test_sums_may_differ_by_rounding_of_what_was_added_up() -> None:
    assert explained(0.0, 5e-9)
    assert not explained(0.0, 5e-8)
    assert explained(0.0, 5e-8, size=100.0)
    assert explained(0.0, 4e-2, half=True)
    assert not explained(0.0, 7e-2, half=True)


def test_sums_in_a_float64_model_are_as_wide_as_the_products_of_each_parameter() -> None:
    """A layer may cast to float32 and back; what another parameter computes in float32 forgives this one nothing."""
    assert explained(0.0, 9e-5, dtype=torch.float32)
    assert not explained(0.0, 2e-4, dtype=torch.float32)
    beside = {0: [captured_along(0.0)], 1: [captured_along(1.0, dtype=torch.float32)]}
    assert unexplained_gradients(beside, {0: row(5e-8)[0], 1: row(1.0)[0]}, torch.ones(2, 1), False) == [0]
    uses = captured_along(1.0).plus(captured_along(2.0, 3.0, torch.float32))
    assert (float(uses.along), uses.size, uses.dtype) == (3.0, 4.0, torch.float32)


def test_a_gradient_of_which_nothing_was_captured_is_unexplained() -> None:
    assert unexplained_gradients({}, {0: row(1.0)[0]}, torch.ones(1, 4), False) == [0]
    assert unexplained_gradients({}, {0: row(0.0)[0]}, torch.ones(1, 4), False) == []


def test_batches_and_uses_of_one_pass_are_added_up() -> None:
    captured = {0: [captured_along(1.0), captured_along(2.0)]}
    assert unexplained_gradients(captured, {0: row(3.0)[0]}, torch.ones(1, 4), False) == []
    assert unexplained_gradients(captured, {0: row(1.0)[0]}, torch.ones(1, 4), False) == [0]


# Losses that compare samples


@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize("spoilt_first", [False, True])
def test_trap_28_a_gradient_that_is_no_number_is_not_separable(value: float, spoilt_first: bool) -> None:
    """With the other samples' outputs as they are, or with others."""
    outputs, targets = torch.full((3, 4), 2.0, dtype=torch.float64), torch.zeros(3)
    require_separable(lambda o, t: o.square().mean(), outputs, targets, BatchSamples(3))

    def loss(o: Tensor, t: Tensor) -> Tensor:
        as_they_are = o[1:].detach().sum() == 16
        return o.square().mean() * torch.where(as_they_are == spoilt_first, value, 1.0)

    with pytest.raises(VerificationError, match="compares samples"):
        require_separable(loss, outputs, targets, BatchSamples(3))


# Where samples are


def test_trap_28_a_gradient_with_nan_is_no_evidence() -> None:
    """What overflows on its way, and is multiplied by zero, says nothing of whose it is."""
    grad = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for silent, factors in ((False, sample_marks(4)), (True, loud_samples(4))):
        first, *others = [Sketch.of(grad * factor[:, None].double(), 4) for factor in factors]
        assert evidence([first, *others], 4, by_silence=silent) == Finding(Placement(0))
        for value in NOT_NUMBERS:
            spoilt = [Sketch.of(torch.full_like(grad, value), 4) for _ in others]
            assert evidence([first, *spoilt], 4, by_silence=silent) == Finding(Unplaced.NOT_FINITE)


# Ranks that hold a model together


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor, Tensor], None]:
    """Has one rank compare its norms with another's."""

    def check(mine: Tensor, others: Tensor) -> None:
        ranks = Ranks()
        ranks._replicas = ["a group"]
        theirs: list[Tensor] = []

        def first(value: Tensor, *_: Any) -> None:
            theirs.append(value.clone())

        def second(value: Tensor, *_: Any) -> None:
            assert value.isnan().sum() == theirs[0].isnan().sum() == 0, "a maximum with NaN is anybody's guess"
            value.copy_(torch.maximum(value, theirs[0]))

        for values, reduce in ((others, first), (mine, second)):
            monkeypatch.setattr(dist, "all_reduce", reduce)
            try:
                ranks.require_same_norms(values[:, None], ["a", "b"])
            except CoverageError:
                assert reduce is second
                raise

    return check


def test_ranks_agree_up_to_rounding(two_ranks: Callable[[Tensor, Tensor], None]) -> None:
    two_ranks(row(1.0, 2.0), row(1.0, 2.001))
    with pytest.raises(CoverageError, match=r"^b: "):
        two_ranks(row(1.0, 2.0), row(1.0, 2.1))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_rank_whose_norm_is_no_number_differs_from_others(
    value: float, two_ranks: Callable[[Tensor, Tensor], None]
) -> None:
    for mine, others in ((1.0, value), (value, 1.0)):
        with pytest.raises(CoverageError, match=r"^a: "):
            two_ranks(row(mine, 2.0), row(others, 2.0))
    two_ranks(row(value, 2.0), row(value, 2.0))  # which all of them refuse for what it is
