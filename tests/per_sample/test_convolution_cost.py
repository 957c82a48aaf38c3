"""Convolutions: every way to the norms gives the same numbers, and the cost model picks among them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from torch_secorder.model.channels import ChannelSums
from torch_secorder.per_sample import Convolution, costs
from torch_secorder.per_sample.convolution_products import shifted_products
from torch_secorder.per_sample.costs import FORMS, predicted
from torch_secorder.per_sample.profiles import CPU

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padding": 1},
    "wide padding": {"padding": 3},
    "stride": {"stride": 2},
    "stride and padding": {"stride": 2, "padding": 1},
    "stride beyond the kernel": {"kernel": 2, "stride": 3},
    "dilation": {"dilation": 2, "padding": 1},
    "dilation and stride": {"dilation": 2, "stride": 2, "padding": 3},
    "groups": {"groups": 2, "padding": 1},
    "groups and stride": {"groups": 2, "stride": 2, "padding": 1},
    "depthwise": {"groups": 4, "out": 4, "padding": 1},
    "depthwise, stride and dilation": {"groups": 4, "out": 8, "stride": 2, "dilation": 2, "padding": 2},
    "kernel of one": {"kernel": 1},
    "kernel of one with stride": {"kernel": 1, "stride": 2},
    "whole map": {"kernel": 5, "map": 5},
    "several maps": {"r": 2, "padding": 1},
    "several maps, stride and dilation": {"r": 3, "stride": 2, "dilation": 2, "padding": 3},
    "several maps in groups": {"r": 2, "groups": 2, "kernel": 1},
}


def convolution(
    dims: int = 2,
    n: int = 5,
    r: int = 1,
    channels: int = 4,
    out: int = 6,
    map: int | None = None,
    kernel: int = 3,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    dtype: torch.dtype = torch.float64,
) -> Convolution:
    """Of random numbers; in several dimensions the map, its stride and its padding differ along the axes."""
    map = (6 if dims == 3 else 8) if map is None else map
    size = [map if kernel == map else map - axis for axis in range(dims)]
    pads = [max(padding - axis, min(padding, 1)) for axis in range(dims)]
    after = [(side + 2 * p - dilation * (kernel - 1) - 1) // stride + 1 for side, p in zip(size, pads, strict=True)]
    x, g = torch.randn(n, r, channels, *size, dtype=dtype), torch.randn(n, r, out, *after, dtype=dtype)
    shape = (out, channels // groups, *[kernel] * dims)
    return Convolution(x, g, shape, [stride] * dims, pads, [dilation] * dims, groups)


@pytest.fixture(params=[None, 1], ids=["large chunks", "chunks of one sample"])
def budget(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        monkeypatch.setattr("torch_secorder.per_sample.costs.BUDGET", request.param)
        monkeypatch.setattr("torch_secorder.per_sample.costs.LIMIT", request.param)
        small = replace(CPU, convolution_bytes=request.param)
        monkeypatch.setattr("torch_secorder.per_sample.convolution.profile_of", lambda _: small)


@pytest.mark.usefixtures("budget")
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_form_gives_the_same_norms(name: str, dims: int) -> None:
    """Products in float32 are the same ones, and are tried with whole batches below."""
    assert_same_norms(name, dims, torch.float64, 1e-12)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_form_gives_the_same_norms_in_single_precision(name: str, dims: int) -> None:
    assert_same_norms(name, dims, torch.float32, 1e-5)


def assert_same_norms(name: str, dims: int, dtype: torch.dtype, rtol: float) -> None:
    form = convolution(dims, **SETTINGS[name], dtype=dtype)
    exact = Convolution(form.x.double(), form.g.double(), *form._settings()).dense()
    for way in FORMS:
        norms = form.squared_norms(way).double()
        torch.testing.assert_close(norms, exact.flatten(1).square().sum(1), rtol=rtol, atol=0)


@pytest.mark.usefixtures("budget")
@pytest.mark.parametrize("settings", [{}, {"stride": 2, "padding": 2}, {"dilation": 2, "padding": 3}], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_few_channels_are_taken_one_sample_at_a_time(channels: int, settings: dict[str, Any]) -> None:
    form = convolution(n=3, channels=channels, map=120, kernel=5, **settings)
    assert form.sizes.one_by_one
    windows = torch.nn.functional.pad(form.x[:, 0], [side for p in reversed(form.padding) for side in (p, p)])
    for axis, (step, gap) in enumerate(zip(form.stride, form.dilation, strict=True), 2):
        windows = windows.unfold(axis, 4 * gap + 1, step)[..., ::gap]
    expected = torch.einsum("niabkl,noab->noikl", windows, form.g[:, 0])
    torch.testing.assert_close(form.dense(), expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(
    "settings", [{}, {"padding": 2}, {"stride": 2}, {"dilation": 2}, {"r": 2, "stride": 3}], ids=str
)
@pytest.mark.parametrize("out", [6, 16])
@pytest.mark.parametrize("dims", [1, 2])
def test_few_features_are_unfolded_along_all_axes(dims: int, out: int, settings: dict[str, Any]) -> None:
    form = convolution(dims, channels=3, out=out, map=12, kernel=4, **settings)
    assert form.sizes.unfolds_all
    found = torch.stack([*shifted_products(form)])
    slices = form.dense().movedim(1, -1).movedim(2, 0)
    torch.testing.assert_close(found, slices.flatten(2, -2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", [{"channels": 4}, {"kernel": 3}, {"map": 12}, {"r": 2}, {"groups": 3}], ids=str)
def test_other_layers_are_taken_several_samples_at_a_time(settings: dict[str, Any]) -> None:
    assert not convolution(**{"n": 3, "channels": 3, "map": 120, "kernel": 5, **settings}).sizes.one_by_one


@pytest.mark.usefixtures("budget")
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_diagonal_is_that_of_the_dense_form(name: str, dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    form = convolution(dims, **SETTINGS[name])
    each = form.dense().square()
    expected, norms = each.sum(0), each.flatten(1).sum(1)
    for cheapest in ("direct", "shifted"):
        costs = {"direct": 2.0, "shifted": 2.0, cheapest: 1.0}
        monkeypatch.setattr("torch_secorder.per_sample.convolution.predicted", lambda _, costs=costs: costs)
        torch.testing.assert_close(form.sum_of_squares(), expected, rtol=1e-12, atol=1e-13)
        with torch.no_grad():
            both = form.squares_and_norms()
        if both is None:
            assert form.sizes.positions == 1
            continue
        torch.testing.assert_close(both[0], expected, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(both[1], norms, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("cheapest", ["direct", "shifted"])
@pytest.mark.parametrize("nonsense", [float("nan"), float("inf")])
def test_squares_that_come_with_the_norms_leave_out_what_is_not_finite(
    nonsense: float, cheapest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a sample is known to be infinite only after parts of it were added up, both are left to their own ways."""
    form = convolution(2)
    expected = form.dense().square()
    form.x[1, 0, 0, 0, 0] = nonsense
    costs = {"direct": 2.0, "shifted": 2.0, cheapest: 1.0}
    monkeypatch.setattr("torch_secorder.per_sample.convolution.predicted", lambda _: costs)
    with torch.no_grad():
        both = form.squares_and_norms()
    assert (both is None) == (cheapest == "shifted")
    if both is not None:
        left = [n for n in range(form.n) if n != 1]
        torch.testing.assert_close(both[0], expected[left].sum(0), rtol=1e-12, atol=1e-13)
        assert both[1].isfinite().tolist() == [n != 1 for n in range(form.n)]


@pytest.mark.usefixtures("budget")
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("name", SETTINGS)
def test_sums_over_channels_are_those_of_the_dense_form(name: str, dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    form = convolution(dims, **SETTINGS[name])
    each = form.dense().square()
    squares, norms = each.sum(0), each.flatten(1).sum(1)
    inputs = torch.cat([part.transpose(0, 1).flatten(1).sum(1) for part in squares.chunk(form.groups)])
    for cheapest in FORMS:
        costs = {"direct": 2.0, "shifted": 2.0, cheapest: 1.0}
        monkeypatch.setattr("torch_secorder.per_sample.convolution.predicted", lambda _, costs=costs: costs)
        for axis, expected in enumerate((squares.flatten(1).sum(1), inputs)):
            found = form.channel_squares(ChannelSums(axis, form.groups))
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
            by_sample = form.sample_channel_squares(ChannelSums(axis, form.groups))
            torch.testing.assert_close(by_sample.sum(0), expected, rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(by_sample.sum(1), norms, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("left_over", [0.0, 1e-6, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_channels_that_cancel_keep_their_digits(
    left_over: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, g = torch.randn(3, 1, 24, 2, 2), torch.randn(3, 1, 20, 2, 2)
    x = torch.cat([half, half * (1 + left_over)], 4).to(dtype)
    form = Convolution(x, torch.cat([g, -g], 4).to(dtype), (20, 24, 1, 1), (1, 1), (0, 0), (1, 1), 1)
    exact = Convolution(form.x.double(), form.g.double(), *form._settings()).dense().square().sum((0, 2, 3, 4))
    monkeypatch.setattr("torch_secorder.per_sample.convolution.predicted", lambda _: {"gram": 1.0, "direct": 2.0})
    found = form.channel_squares(ChannelSums(0))
    assert (found >= 0).all()
    if left_over >= 1e-3 or dtype == torch.float64:
        torch.testing.assert_close(found.double(), exact, rtol=1e-4 if dtype == torch.float32 else 1e-8, atol=1e-20)
    else:
        magnitude = form.x.double().square().sum() * form.g.double().square().sum((0, 1, 3, 4))
        assert (found.double() <= 1e-11 * magnitude).all()


@pytest.mark.usefixtures("budget")
@pytest.mark.parametrize("sizes", [(16, 20), (20, 16), (3, 40), (40, 3)], ids=str)
def test_either_order_of_the_factors_gives_the_same(sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    form = convolution(channels=sizes[0], out=sizes[1], kernel=1, groups=1)
    dense = form.dense()
    torch.testing.assert_close(form.squared_norms("shifted"), dense.flatten(1).square().sum(1), rtol=1e-12, atol=0)
    monkeypatch.setattr("torch_secorder.per_sample.convolution.predicted", lambda _: {"direct": 2.0, "shifted": 1.0})
    torch.testing.assert_close(form.sum_of_squares(), dense.square().sum(0), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("way", FORMS)
@pytest.mark.parametrize("settings", [{"stride": 2, "padding": 1}, {"r": 2}, {"groups": 2}], ids=str)
def test_every_form_can_be_differentiated(way: str, settings: dict[str, Any]) -> None:
    form = convolution(n=2, map=5, **settings)
    x, g = form.x.requires_grad_(), form.g.requires_grad_()

    def norms(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return Convolution(x, g, *form._settings()).squared_norms(way)

    assert torch.autograd.gradcheck(norms, (x, g), atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("left_over", [0.0, 1e-6, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_sums_that_cancel_keep_their_digits(left_over: float, dtype: torch.dtype) -> None:
    """The second half of a map repeats the first, with the output gradient's sign changed."""
    half, g = torch.randn(3, 1, 24, 2, 2), torch.randn(3, 1, 20, 2, 2)
    x = torch.cat([half, half * (1 + left_over)], 4).to(dtype)
    form = Convolution(x, torch.cat([g, -g], 4).to(dtype), (20, 24, 1, 1), (1, 1), (0, 0), (1, 1), 1)
    exact = Convolution(form.x.double(), form.g.double(), *form._settings()).squared_norms("direct")
    norms = form.squared_norms("gram")
    assert (norms >= 0).all()
    if left_over >= 1e-3 or dtype == torch.float64:
        torch.testing.assert_close(norms.double(), exact, rtol=1e-4 if dtype == torch.float32 else 1e-8, atol=1e-20)
    else:
        magnitude = form.x.double().square().sum((1, 2, 3, 4)) * form.g.double().square().sum((1, 2, 3, 4))
        assert (norms.double() <= 1e-11 * magnitude).all()


@pytest.mark.parametrize("name", SETTINGS)
def test_the_picked_form_is_an_applicable_one(name: str) -> None:
    form = convolution(**SETTINGS[name])
    costs = predicted(form.sizes)
    assert "direct" in costs
    assert form.algorithm in costs
    assert all(0 < cost < math.inf for cost in costs.values())
    assert form.squared_norms(form.algorithm).equal(form.squared_norm())


@pytest.mark.parametrize(
    ("settings", "algorithm"),
    [
        ({"n": 32, "channels": 256, "out": 256, "map": 4, "padding": 1}, "gram"),
        ({"n": 32, "channels": 64, "out": 64, "map": 4, "kernel": 4}, "patches"),
        ({"n": 8, "channels": 3, "out": 64, "map": 64, "kernel": 16, "stride": 16}, "patches"),
        ({"n": 8, "channels": 3, "out": 64, "map": 112, "kernel": 7, "stride": 2, "padding": 3}, "direct"),
        ({"n": 8, "channels": 16, "out": 32, "map": 64, "kernel": 1}, "shifted"),
        ({"n": 8, "channels": 32, "out": 32, "map": 32, "groups": 32, "padding": 1}, "direct"),
        ({"n": 8, "channels": 32, "out": 32, "map": 32, "groups": 32, "kernel": 7, "padding": 3}, "shifted"),
        ({"n": 2, "channels": 64, "out": 3, "map": 32, "padding": 1}, "shifted"),
    ],
    ids=str,
)
def test_unmistakable_cases(settings: dict[str, Any], algorithm: str) -> None:
    assert convolution(**settings, dtype=torch.float32).algorithm == algorithm


@pytest.mark.parametrize("n", [1, 7, 32, 33])
@pytest.mark.parametrize("way", FORMS)
def test_no_part_is_left_over(way: str, n: int) -> None:
    """Parts are of one size as nearly as can be: none is smaller by more than their number."""
    sizes = convolution(n=n, channels=32, out=32, map=32, padding=1, dtype=torch.float32).sizes
    parts = -(-n // sizes.step(way))
    assert parts * sizes.step(way) - n < parts


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_temporaries_stay_within_their_budget(size: int) -> None:
    """Several samples at a time only as far as the budget goes, and no form whose single sample is far beyond it."""
    sizes = convolution(n=32, channels=16, out=16, map=size, padding=1, dtype=torch.float32).sizes
    for way in FORMS:
        assert sizes.step(way) == 1 or sizes.step(way) * sizes.floats(way) * sizes.itemsize <= costs.BUDGET, way
        if way in predicted(sizes) and way != "direct":
            assert sizes.floats(way) * sizes.itemsize <= costs.LIMIT, way


@pytest.mark.parametrize("dims", [1, 2])
def test_maps_of_one_pixel_have_strides_of_any_order(dims: int) -> None:
    """Channels-last strides, as torch's convolution in float64 on the host refuses them for its gradient in the weight."""
    x, g = (torch.randn(3, *[1] * dims, channels).double().movedim(-1, 1) for channels in (4, 5))
    sides = [1] * dims
    form = Convolution(x.unsqueeze(1), g.unsqueeze(1), (5, 4, *[3] * dims), sides, sides, sides, 1)
    middle = form.dense()[(..., *sides)]
    expected = torch.einsum("ni,nj->nij", g.flatten(1), x.flatten(1))
    assert torch.allclose(middle, expected, rtol=1e-12)
    assert torch.allclose(form.dense().square().sum(), expected.square().sum(), rtol=1e-12)
