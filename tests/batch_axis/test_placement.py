"""What a placement says of a tensor's indices, and how rows are put together by samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torch_secorder.batch_axis.placement import FIRST, Layout, Placement

CPU = torch.device("cpu")
LISTED = torch.tensor([2, 0, 0, 3, 2, 0])  # sample 1 has no row

PLACEMENTS = {
    "blocks": (Placement(0, Layout.BLOCKS), [0, 0, 1, 1, 2, 2]),
    "interleaved": (Placement(0, Layout.INTERLEAVED), [0, 1, 2, 0, 1, 2]),
    "indexed": (Placement(0, Layout.INDEXED, LISTED), LISTED.tolist()),
}


def test_one_index_for_each_sample() -> None:
    assert FIRST.fits((5, 3), 5)
    assert not FIRST.fits((3, 5), 5)
    assert not FIRST.fits((), 5)
    assert Placement(1).fits((3, 5), 5)
    assert FIRST.sample_of_index(5, 5, CPU) is None
    assert FIRST.grouping(5, CPU) is None


@pytest.mark.parametrize(("size", "fits"), [(6, True), (3, True), (0, False), (7, False)])
@pytest.mark.parametrize("layout", [Layout.BLOCKS, Layout.INTERLEAVED])
def test_several_indices_for_each_sample_are_a_multiple(layout: Layout, size: int, fits: bool) -> None:
    assert Placement(1, layout).fits((2, size), 3) == fits


def test_a_list_fits_as_many_indices_as_it_has() -> None:
    placement = Placement(0, Layout.INDEXED, LISTED)
    assert placement.fits((6, 2), 4)
    assert not placement.fits((5, 2), 4)


def test_the_only_sample_that_has_a_gradient() -> None:
    placement, grad = Placement(0, Layout.INDEXED, torch.tensor([1, 1, 3])), torch.ones(3, 2)
    assert placement.only_sample(grad, 4) is None
    assert Placement(0, Layout.INDEXED, torch.tensor([1, 1, 1])).only_sample(grad, 4) == torch.tensor([1])
    grad[:2] = 0
    assert placement.only_sample(grad, 4) == torch.tensor([3]), "rows without a gradient may be any sample's"


@pytest.mark.parametrize("name", PLACEMENTS)
def test_the_sample_of_each_index(name: str) -> None:
    placement, owners = PLACEMENTS[name]
    found = placement.sample_of_index(6, max(owners) + 1, CPU)
    assert found is not None
    assert found.tolist() == owners


@pytest.mark.parametrize("name", PLACEMENTS)
def test_rows_are_grouped_by_sample_in_their_order_and_padded_with_zeros(name: str) -> None:
    placement, owners = PLACEMENTS[name]
    n, value = max(owners) + 1, torch.randn(6, 2, 3)
    grouping = placement.grouping(n, CPU)
    assert grouping is not None
    rows, sums = grouping.rows(value), grouping.sums(value)
    most = max(owners.count(sample) for sample in range(n))
    assert rows.shape == (n, most, 2, 3)
    for sample in range(n):
        own: Tensor = value[[index for index, owner in enumerate(owners) if owner == sample]]
        assert torch.equal(rows[sample, : len(own)], own)
        assert not rows[sample, len(own) :].any()
        torch.testing.assert_close(sums[sample], own.sum(0))
