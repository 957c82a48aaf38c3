"""The evidence for where a gradient has its samples, from gradients that are made here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from torch_secorder.batch_axis.evidence import Evidence, Finding, Open, Unplaced, evidence
from torch_secorder.batch_axis.marks import MARKS_PER_PASS, MARKS_PER_PASS_OF_HALF, sample_marks
from torch_secorder.batch_axis.placement import Layout, Placement
from torch_secorder.batch_axis.silence import loud_samples
from torch_secorder.batch_axis.sketch import Sketch, read_together

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALF = (torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def marks_of(dtype: torch.dtype) -> int:
    return MARKS_PER_PASS_OF_HALF if dtype in HALF else MARKS_PER_PASS


def sketched(gradients: Sequence[Tensor], n: int, *, in_brief: bool = False) -> list[Sketch]:
    """The sketches of the gradients of one place in each pass of a look."""
    first = Sketch.of(gradients[0], n, in_brief=in_brief)
    others = [Sketch.of(grad, n, in_brief=in_brief, first=first) for grad in gradients[1:]]
    (read,) = read_together([[first, *others]])
    return [sketch for sketch in read if sketch is not None]


def look(make: Callable[[Tensor], Tensor], n: int, dtype: torch.dtype, *, silent: bool, brief: bool) -> Finding | Open:
    """What one look shows of the gradient that a seed gives in which sample n has the factor of index n."""
    factors = loud_samples(n) if silent else sample_marks(n, marks_of(dtype))
    gradients = [make(factor.double()).to(dtype) for factor in factors]
    return evidence(sketched(gradients, n, in_brief=brief), n, marks_of(dtype), by_silence=silent)


def looked_at(make: Callable[[Tensor], Tensor], n: int, dtype: torch.dtype = torch.float64) -> Finding:
    """What the gradient shows, whichever way it is looked at."""
    found = look(make, n, dtype, silent=True, brief=False)
    assert isinstance(found, Finding)
    for silent, brief in ((True, True), (False, True), (False, False)):
        other = look(make, n, dtype, silent=silent, brief=brief)
        assert isinstance(other, Open) or str(other) == str(found)  # as text, since lists of samples are tensors
        assert brief or other is not Open.AXES
    return found


def seen(make: Callable[[Tensor], Tensor], n: int, dtype: torch.dtype = torch.float64) -> Evidence:
    return looked_at(make, n, dtype).evidence


def along(owners: Tensor, axis: int, *shape: int) -> Callable[[Tensor], Tensor]:
    """Gradients of which each index along an axis has the factor of its owner."""
    value = torch.randn(shape, dtype=torch.float64)
    view = [-1 if a == axis else 1 for a in range(len(shape))]
    return lambda mark: value * mark[owners].view(view)


@pytest.mark.parametrize("marks", [MARKS_PER_PASS, MARKS_PER_PASS_OF_HALF])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 32, 33, 64, 65, 1024, 1025, 5000])
def test_two_samples_differ_in_some_mark_and_marks_are_powers_of_two(n: int, marks: int) -> None:
    ones, *rest = sample_marks(n, marks)
    assert torch.equal(ones, torch.ones(n))
    assert len({tuple(mark) for mark in torch.stack(rest, 1).tolist()}) == n
    for mark in rest:
        assert torch.equal(mark.log2(), mark.log2().round())
        assert float(mark.max()) < 2.0**marks


def test_as_many_passes_as_the_number_of_samples_has_digits() -> None:
    assert [len(sample_marks(n)) - 1 for n in (1, 32, 33, 1024, 1025)] == [1, 1, 2, 2, 3]
    assert [len(sample_marks(n, 8)) - 1 for n in (8, 9, 64, 65, 512)] == [1, 2, 2, 3, 3]


@every_dtype
@pytest.mark.parametrize("n", [2, 5, 33, 300, 2000])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_axis_that_counts_samples(axis: int, n: int, dtype: torch.dtype) -> None:
    shape = [3, 4, 3]
    shape[axis] = n
    assert seen(along(torch.arange(n), axis, *shape), n, dtype) == Placement(axis)


@every_dtype
@pytest.mark.parametrize("axis", [0, 1])
def test_as_many_samples_as_features(axis: int, dtype: torch.dtype) -> None:
    assert seen(along(torch.arange(6), axis, 6, 6), 6, dtype) == Placement(axis)


@every_dtype
@pytest.mark.parametrize("n", [3, 40])
def test_several_indices_for_each_sample(n: int, dtype: torch.dtype) -> None:
    blocks, turns = torch.arange(n).repeat_interleave(4), torch.arange(n).repeat(4)
    assert seen(along(blocks, 0, 4 * n, 5), n, dtype) == Placement(0, Layout.BLOCKS)
    assert seen(along(turns, 0, 4 * n, 5), n, dtype) == Placement(0, Layout.INTERLEAVED)
    assert seen(along(blocks, 1, 5, 4 * n), n, dtype) == Placement(1, Layout.BLOCKS)


@every_dtype
def test_rows_that_a_router_sent_anywhere(dtype: torch.dtype) -> None:
    owners = torch.randint(40, (100,), generator=torch.Generator().manual_seed(0))
    found = seen(along(owners, 0, 100, 6), 40, dtype)
    assert isinstance(found, Placement)
    assert found.layout is Layout.INDEXED
    assert found.sample_index is not None
    assert torch.equal(found.sample_index, owners)


@every_dtype
@pytest.mark.parametrize("n", [2, 6, 200])
def test_what_belongs_to_all_samples(n: int, dtype: torch.dtype) -> None:
    """A sum over samples, of the shapes that look most like theirs."""
    parts = torch.randn(n, n, 4, dtype=torch.float64)
    assert seen(lambda mark: (mark.view(-1, 1, 1) * parts).sum(0), n, dtype) is Unplaced.SHARED_BY_SAMPLES
    assert seen(lambda mark: mark.sum(), n, dtype) is Unplaced.SHARED_BY_SAMPLES


def test_what_a_few_samples_share_in_each_row() -> None:
    """As behind a convolution along the batch: most of row n is sample n's, and some is its neighbor's."""
    value = torch.randn(6, 5, dtype=torch.float64)
    found = seen(lambda mark: value * mark[:, None] + 0.1 * (value * mark[:, None]).roll(1, 0), 6)
    assert found is Unplaced.SHARED_BY_SAMPLES


@pytest.mark.parametrize(
    ("dtype", "coupling"),
    [(torch.float64, 1e-8), (torch.float32, 1e-4), (torch.bfloat16, 0.04), (torch.float16, 0.1)],
    ids=str,
)
def test_a_weak_coupling_is_no_rounding(dtype: torch.dtype, coupling: float) -> None:
    value = torch.randn(6, 500, dtype=torch.float64)

    def make(mark: Tensor) -> Tensor:
        own = value * mark[:, None]
        return own + coupling * own.roll(1, 0)

    assert seen(make, 6, dtype) is Unplaced.SHARED_BY_SAMPLES


def test_a_coupling_far_below_the_largest_row_is_no_rounding() -> None:
    """As behind the norm of a row of zeros, whose derivative of 1e12 cancels before the parameters: the coupling is left."""
    size = torch.tensor([1e12, 1, 1, 1, 1, 1], dtype=torch.float64)[:, None]
    value = torch.randn(6, 500, dtype=torch.float64)

    def make(mark: Tensor) -> Tensor:
        own = value * mark[:, None]
        return size * own + (size == 1) * own.roll(1, 0)

    assert seen(make, 6) is Unplaced.SHARED_BY_SAMPLES


@every_dtype
def test_every_sample_proves_a_placement(dtype: torch.dtype) -> None:
    for axis, shape in enumerate([(6, 5), (5, 6)]):
        assert looked_at(along(torch.arange(6), axis, *shape), 6, dtype) == Finding(Placement(axis), proven=True)
    blocks = torch.arange(6).repeat_interleave(3)
    assert looked_at(along(blocks, 0, 18, 5), 6, dtype) == Finding(Placement(0, Layout.BLOCKS), proven=True)


@every_dtype
@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((18, 5), [0]),  # blocks and turns alike
        ((18, 5), [0, 4, 8, 9]),  # blocks, but two samples might lie anywhere
        ((6, 5), [0, 1, 2, 3, 4]),  # one sample might be another's
    ],
    ids=str,
)
def test_rows_without_a_gradient_prove_nothing(shape: tuple[int, int], rows: list[int], dtype: torch.dtype) -> None:
    owners = torch.arange(6).repeat_interleave(shape[0] // 6)
    there = torch.zeros(shape[0], 1, dtype=torch.float64)
    there[rows] = 1
    grad = along(owners, 0, *shape)
    found = looked_at(lambda mark: grad(mark) * there, 6, dtype)
    assert isinstance(found.evidence, Placement)
    assert not found.proven


@every_dtype
def test_gradients_that_say_nothing(dtype: torch.dtype) -> None:
    n = 5
    some = Sketch.of(torch.randn(n, 3).to(dtype), n)
    assert evidence([None, some], n, marks_of(dtype)) == Finding(Unplaced.NO_GRADIENT)
    assert evidence([some, None], n, marks_of(dtype)) == Finding(Unplaced.NO_GRADIENT)
    assert seen(lambda mark: torch.zeros(n, 3), n, dtype) is Unplaced.NO_GRADIENT
    tiny = torch.finfo(dtype).tiny
    assert seen(lambda mark: mark[:, None] * torch.full((n, 3), tiny / 8), n, dtype) is Unplaced.NO_GRADIENT


def test_a_gradient_without_elements_says_nothing() -> None:
    assert seen(lambda mark: torch.zeros(0, 3), 5) is Unplaced.NO_GRADIENT


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_has_no_place(value: float) -> None:
    def make(mark: Tensor) -> Tensor:
        grad = mark[:, None] * torch.ones(5, 3, dtype=torch.float64)
        grad[2, 1] = value
        return grad

    assert seen(make, 5) is Unplaced.NOT_FINITE


@pytest.mark.parametrize("shape", [(5, 5000), (5, 3, 5000), (5000, 5)], ids=str)
def test_long_gradients(shape: tuple[int, ...]) -> None:
    """Directions for a long side are products of shorter ones."""
    axis = shape.index(5)
    assert seen(along(torch.arange(5), axis, *shape), 5, torch.float32) == Placement(axis)


def test_sums_of_half_precision_are_taken_in_more() -> None:
    """4,000 ones add up to 4,000: in bfloat16 they would stop at 256."""
    plain, doubled = sketched([torch.full((2, 4000), value, dtype=torch.bfloat16) for value in (1.0, 2.0)], 2)
    for one, two in zip(plain.axes.values(), doubled.axes.values(), strict=True):
        assert torch.equal(2 * one, two)
    (exact,) = sketched([torch.ones(2, 4000, dtype=torch.float64)], 2)
    torch.testing.assert_close(plain.axes[0], exact.axes[0], rtol=1e-4, atol=1e-4)


def test_only_axes_that_may_count_samples_are_looked_at() -> None:
    """And the first one, whose rows may be anybody's."""
    assert Sketch.of(torch.randn(7, 5, 3, 10), 5).axes.keys() == {0, 1, 3}


def in_brief(make: Callable[[Tensor], Tensor], n: int) -> tuple[Sketch, Finding | Open]:
    """The sketch in the plain pass of the likeliest axes, and what such sketches show."""
    sketches = sketched([make(mark.double()) for mark in sample_marks(n)], n, in_brief=True)
    return sketches[0], evidence(sketches, n)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_look_at_the_likeliest_axis_is_enough_where_slices_of_the_others_have_several_samples(axis: int) -> None:
    shape = [8, 12, 16]
    shape[axis] = 4
    sketch, found = in_brief(along(torch.arange(4), axis, *shape), 4)
    assert list(sketch.axes) == [axis]
    assert len(sketch.slices) == 2
    assert found == Finding(Placement(axis))


def test_a_look_at_one_slice_of_an_axis_leaves_open_what_whole_axes_show() -> None:
    owners = torch.eye(4, dtype=torch.float64).repeat_interleave(3, 1)  # [4, 12], of which sample n has a block
    sketch, found = in_brief(lambda mark: mark[:, None] * owners, 4)
    assert list(sketch.slices) == [1]
    assert found is Open.AXES
    assert looked_at(lambda mark: mark[:, None] * owners, 4).others == (Placement(1, Layout.BLOCKS),)


def test_a_look_at_one_slice_leaves_open_what_lies_on_another_axis() -> None:
    _, found = in_brief(along(torch.arange(4).repeat_interleave(3), 1, 4, 12), 4)
    assert found is Open.AXES
    assert looked_at(along(torch.arange(4).repeat_interleave(3), 1, 4, 12), 4).evidence == Placement(1, Layout.BLOCKS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 12, 16), (4, 60, 400), (4, 24, 1000)], ids=str)
def test_the_slices_that_are_looked_at_go_through_the_largest_entry(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    value = torch.randn(shape).to(dtype)
    place = value.numel() * 5 // 7
    value.view(-1)[place] = -99
    sketch = Sketch.of(value, 4, in_brief=True)
    assert float(sketch.largest) == 99
    assert {axis: int(index) for axis, (index, _) in sketch.slices.items()} == {
        1: place // shape[2] % shape[1],
        2: place % shape[2],
    }


def test_a_slice_that_may_have_been_rounded_another_way_leaves_whole_axes_open_on_accelerators() -> None:
    """There the whole axis shows that it may be rounding, and silence that it is."""
    exact = along(torch.arange(4).repeat_interleave(3), 1, 5, 12)
    gradients = [exact(mark.double()) * (1 + 0.02 * torch.randn(5, 12)) for mark in sample_marks(4)]
    brief, whole = (
        [replace(x, device=torch.device("meta")) for x in sketched(gradients, 4, in_brief=b)] for b in (True, False)
    )
    assert evidence(brief, 4) is Open.AXES
    assert evidence(whole, 4) is Open.ROUNDING
    assert look(exact, 4, torch.float64, silent=True, brief=False) == Finding(Placement(1, Layout.BLOCKS))
    on_cpu = [replace(x, device=torch.device("cpu")) for x in brief]
    assert evidence(on_cpu, 4) == Finding(Unplaced.SHARED_BY_SAMPLES)
