"""Where samples are said to be, and how rows are put together by it."""

from __future__ import annotations

import pytest
import torch

from torch_secorder.batch_axis.placement import Layout, Placement

CPU = torch.device("cpu")
INDEX = torch.tensor([2, 0, 0, 1, 2, 2])
PLACEMENTS = {
    "blocks": (Placement(0, Layout.BLOCKS), [0, 0, 1, 1, 2, 2]),
    "interleaved": (Placement(0, Layout.INTERLEAVED), [0, 1, 2, 0, 1, 2]),
    "indexed": (Placement(0, Layout.INDEXED, INDEX), INDEX.tolist()),
}


@pytest.mark.parametrize("name", PLACEMENTS)
def test_rows_are_put_together_by_sample(name: str) -> None:
    placement, expected = PLACEMENTS[name]
    index = placement.sample_of_index(6, 3, CPU)
    grouping = placement.grouping(3, CPU)
    assert index is not None
    assert grouping is not None
    assert index.tolist() == expected
    value = torch.randn(6, 4, dtype=torch.float64)
    sums = torch.stack([value[index == n].sum(0) for n in range(3)])
    torch.testing.assert_close(grouping.sums(value), sums)
    torch.testing.assert_close(grouping.rows(value).sum(1), sums)
    assert grouping.rows(value).shape == (3, max(expected.count(n) for n in range(3)), 4)


def test_an_index_for_each_sample_takes_no_grouping() -> None:
    assert Placement().grouping(3, CPU) is None
    assert Placement().sample_of_index(3, 3, CPU) is None


@pytest.mark.parametrize(
    ("placement", "shape", "fits"),
    [
        (Placement(), (3, 5), True),
        (Placement(), (5, 3), False),
        (Placement(1), (5, 3), True),
        (Placement(2), (3, 3), False),
        (Placement(0, Layout.BLOCKS), (6, 5), True),
        (Placement(0, Layout.INTERLEAVED), (7, 5), False),
        (Placement(0, Layout.BLOCKS), (0, 5), False),
        (Placement(0, Layout.INDEXED, INDEX), (6, 5), True),
        (Placement(0, Layout.INDEXED, INDEX), (3, 5), False),
    ],
    ids=str,
)
def test_what_fits_a_shape(placement: Placement, shape: tuple[int, ...], fits: bool) -> None:
    assert placement.fits(shape, 3) == fits


def test_one_sample_that_has_all_of_it() -> None:
    assert Placement(0, Layout.INDEXED, torch.tensor([1, 1, 1])).is_one_sample
    assert not Placement(0, Layout.INDEXED, torch.tensor([1, 1, 0])).is_one_sample
    assert not Placement(0, Layout.BLOCKS).is_one_sample
