"""What marked gradients say of their samples: each layout on each axis, lists, and what belongs to no single sample."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from torch_secorder.batch_axis.evidence import (
    MARKS_PER_PASS,
    MARKS_PER_PASS_OF_HALF,
    Evidence,
    Sketch,
    Unplaced,
    evidence,
    sample_marks,
)
from torch_secorder.batch_axis.placement import Layout, Placement

N = 5
LAYOUTS = [Layout.ONE_EACH, Layout.BLOCKS, Layout.INTERLEAVED]


def found(
    grad: Tensor, sample_of_index: Tensor, axis: int, n: int = N, marks_per_pass: int = MARKS_PER_PASS
) -> Evidence:
    """The evidence for a gradient whose indices on `axis` belong to these samples."""
    column = [-1] + [1] * (grad.dim() - axis - 1)
    passes = [grad * marks[sample_of_index].to(grad).view(column) for marks in sample_marks(n, marks_per_pass)]
    plain, *marked = map(Sketch.of, passes)
    return evidence(plain, marked, n, marks_per_pass)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_placement_is_read_from_gradients(layout: Layout, axis: int, dtype: torch.dtype) -> None:
    shape = [3, 4, 7]
    shape[axis] = N if layout is Layout.ONE_EACH else 3 * N
    placement = Placement(axis, layout)
    sample_of_index = placement.sample_of_index(shape[axis], N, torch.device("cpu"))
    marks = MARKS_PER_PASS_OF_HALF if dtype is torch.bfloat16 else MARKS_PER_PASS
    index = torch.arange(N) if sample_of_index is None else sample_of_index
    assert found(torch.randn(shape).to(dtype), index, axis, marks_per_pass=marks) == placement


def test_of_two_axes_with_an_index_for_each_sample_the_marked_one_is_found() -> None:
    for axis in range(3):
        assert found(torch.randn(N, N, N), torch.arange(N), axis) == Placement(axis)


def test_a_list_is_read_off() -> None:
    index = torch.tensor([3, 0, 0, 4, 1, 1, 2, 0])
    placement = found(torch.randn(8, 3), index, 0)
    assert isinstance(placement, Placement)
    assert placement.layout is Layout.INDEXED
    assert torch.equal(placement.sample_index, index)


def test_what_samples_share_has_no_placement() -> None:
    grads = torch.randn(N, 6, 3)
    passes = [(grads * marks.view(-1, 1, 1)).sum(0) for marks in sample_marks(N)]
    plain, *marked = map(Sketch.of, passes)
    assert evidence(plain, marked, N) is Unplaced.SHARED_BY_SAMPLES
    plain, *marked = (Sketch.of(x.sum()) for x in passes)
    assert evidence(plain, marked, N) is Unplaced.SHARED_BY_SAMPLES


@pytest.mark.parametrize("value", [0.0, 1e-41, float("nan")])
def test_gradients_without_digits_show_nothing(value: float) -> None:
    assert found(torch.full((N, 3), value), torch.arange(N), 0) is Unplaced.NO_GRADIENT


def test_no_gradient_shows_nothing() -> None:
    sketch = Sketch.of(torch.randn(N, 3))
    assert evidence(None, [sketch], N) is Unplaced.NO_GRADIENT
    assert evidence(sketch, [None], N) is Unplaced.NO_GRADIENT


@pytest.mark.parametrize("marks_per_pass", [MARKS_PER_PASS, MARKS_PER_PASS_OF_HALF])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 33, 64, 65])
def test_any_two_samples_differ_in_a_mark(n: int, marks_per_pass: int) -> None:
    ones, *passes = sample_marks(n, marks_per_pass)
    assert (ones == 1).all()
    rows = torch.stack(passes, 1)
    assert rows.max() <= 2 ** (marks_per_pass - 1)
    for one, other in itertools.combinations(range(n), 2):
        assert (rows[one] != rows[other]).any()
