"""Normalizations over channels: whichever way the sums are taken, they are those of autograd."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from torch_secorder.rules.normalization import ROWS, over_channels, with_running

EPS = 0.1
MAPS = {"nothing": (), "short": (5,), "rows": (4, 4), "odd": (7, 7), "volume": (3, 4, 5), "channels last": (6, 6)}


def drawn(map: str, far: float, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """An input, an output gradient, running means that are ``far`` from zero and variances."""
    shape = (3, 4, *MAPS[map])
    mean, variance = torch.randn(4) + far, torch.rand(4) + 0.5
    x, g = torch.randn(shape) + mean.view(4, *[1] * len(MAPS[map])), torch.randn(shape)
    if map == "channels last":
        x, g = (value.to(memory_format=torch.channels_last) for value in (x, g))
    return tuple(value.to(dtype) for value in (x, g, mean, variance))


def by_autograd(x: torch.Tensor, g: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> list[torch.Tensor]:
    """The gradients of weight and bias, sample by sample, in float64."""
    x, g, mean, variance = (value.double() for value in (x, g, mean, variance))
    weight, bias = torch.ones_like(mean).requires_grad_(), torch.zeros_like(mean).requires_grad_()
    samples = [
        torch.autograd.grad(
            F.batch_norm(x[n : n + 1], mean, variance, weight, bias, eps=EPS), (weight, bias), g[n : n + 1]
        )
        for n in range(len(x))
    ]
    return [torch.stack(values) for values in zip(*samples, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("far", [0.0, 1000.0])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("map", MAPS)
def test_running_statistics(map: str, far: float, recorded: bool, dtype: torch.dtype) -> None:
    x, g, mean, variance = drawn(map, far, dtype)
    expected = by_autograd(x, g, mean, variance)
    with torch.set_grad_enabled(recorded):
        found = with_running(x, g, mean, variance, EPS)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    for value, exact in zip(found, expected, strict=True):
        assert value.dtype == dtype
        # F.batch_norm, which two of the ways use, subtracts a mean that is far away after it has scaled both.
        torch.testing.assert_close(
            value.double(), exact, rtol=0, atol=tolerance * float(exact.abs().max()) * (1 + far / 10)
        )


@pytest.mark.parametrize("map", ["rows", "odd", "channels last"])
def test_sums_over_channels(map: str) -> None:
    x, g, *_ = drawn(map, 0.0, torch.float64)
    with torch.no_grad():
        weight, bias = over_channels(x, g)
    torch.testing.assert_close(weight, (x * g).flatten(2).sum(2), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(bias, g.flatten(2).sum(2), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("size", [ROWS.stop - 1, ROWS.stop])
def test_long_rows_keep_their_digits(size: int) -> None:
    x, g = torch.randn(1, 2, size) + 1, torch.randn(1, 2, size) + 1
    with torch.no_grad():
        found = over_channels(x, g)
    for value, exact in zip(found, ((x.double() * g.double()).sum(2), g.double().sum(2)), strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)


def test_running_statistics_can_be_differentiated() -> None:
    x, g, mean, variance = drawn("rows", 0.0, torch.float64)

    def gradients(x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return with_running(x, g, mean, variance, EPS)

    assert torch.autograd.gradcheck(gradients, (x.requires_grad_(), g.requires_grad_()))
