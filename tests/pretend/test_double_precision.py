"""In which precision sums are taken, and how exact they are on a device without float64."""

from __future__ import annotations

import pytest
import torch

import pretend
from torch_secorder.autograd.double_precision import (
    in_double_precision,
    on_host,
    sum_in_double_precision,
    widest_dtype,
)
from torch_secorder.capture.watched_calls import Moments

HERE = torch.device("pretend:0")


@pytest.mark.parametrize("device", [torch.device("cpu"), HERE], ids=str)
def test_sums_stay_on_a_device_that_has_float64(device: torch.device) -> None:
    x = torch.full((3,), 0.1, device=device)
    assert widest_dtype(device) == torch.float64
    for value in (in_double_precision(x), sum_in_double_precision(x), sum_in_double_precision(x, x)):
        assert (value.dtype, value.device) == (torch.float64, device)
    assert on_host(x).device.type == "cpu"


@pytest.mark.usefixtures("_without_float64")
def test_they_go_to_the_host_from_a_device_that_has_none() -> None:
    x = torch.full((3,), 0.1, device=HERE)
    assert widest_dtype(HERE) == torch.float32
    for value in (in_double_precision(x), on_host(x), sum_in_double_precision(x), sum_in_double_precision(x, x)):
        assert (value.dtype, value.device.type) == (torch.float64, "cpu")
    assert torch.equal(on_host(x), x.cpu().double())


@pytest.mark.usefixtures("_without_float64")
@pytest.mark.parametrize("length", [0, 1, 4096, 100_003, 2**22 + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_without_float64_are_as_exact_as_single_precision_can_be(length: int, dtype: torch.dtype) -> None:
    """Of positive numbers, within the rounding of a row: some eps, whatever the length. One float32 running sum would be off by
    more than 1e-4 for the longest."""
    x = torch.rand(length).to(dtype)
    for found, right in (
        (sum_in_double_precision(pretend.moved(x)), x.double().sum()),
        (sum_in_double_precision(pretend.moved(x), pretend.moved(x)), x.double().square().sum()),
    ):
        assert abs(found - right) <= 4 * torch.finfo(torch.float32).eps * right


@pytest.mark.usefixtures("_without_float64")
@pytest.mark.parametrize("length", [1, 4096, 300_003])
def test_moments_of_outputs_keep_their_digits_without_float64(length: int) -> None:
    """But for the rounding of a row, as long as it may be."""
    near = 4 * torch.finfo(torch.float32).eps
    x = 10 + torch.randn(length)
    count, total, squares, *ends = Moments.of(pretend.moved(x)).pooled()
    assert (count, ends) == (length, [float(x.min()), float(x.max())])
    assert total == pytest.approx(float(x.double().sum()), rel=near)
    assert squares == pytest.approx(float(x.double().square().sum()), rel=near)
