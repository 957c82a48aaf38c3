"""What counts as half precision, and what switches autocast off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_secorder.autograd import precision
from torch_secorder.autograd.precision import autocast_devices, full_precision, has_half_precision, is_half


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_tensor_has_half_precision_or_not(dtype: torch.dtype) -> None:
    x = torch.zeros(2, dtype=dtype)
    assert is_half(x) == has_half_precision(x) == (dtype.itemsize == 2)


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu", "mps", "mtia", "privateuseone"])
def test_autocast_is_seen_and_switched_off_on_any_device(device: str) -> None:
    """Also on one that isn't there: the setting is all that it takes."""
    assert autocast_devices() == []
    torch.set_autocast_enabled(device, True)
    try:
        assert autocast_devices() == [device]
        assert has_half_precision(torch.zeros(2))
        if device != "privateuseone":  # which has to come with a package that says what its autocast is
            with full_precision():
                assert autocast_devices() == []
            assert autocast_devices() == [device]
    finally:
        torch.set_autocast_enabled(device, False)


def test_device_types_that_this_torch_does_not_know_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_DEVICE_TYPES", ("cpu", "no such device"))
    precision._devices_with_autocast.cache_clear()
    try:
        assert autocast_devices() == []
        with torch.autocast("cpu", torch.bfloat16):
            assert autocast_devices() == ["cpu"]
    finally:
        precision._devices_with_autocast.cache_clear()


def test_products_keep_their_precision_inside_of_autocast() -> None:
    x = torch.randn(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with full_precision():
            assert torch.equal(x @ x, torch.einsum("ij,jk->ik", x, x))
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


class Inside(nn.Module):
    """Runs under autocast for itself, and returns float32."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.layer, self.dtype = nn.Linear(4, 3), dtype

    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            return self.layer(x).float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
def test_the_graph_tells_of_half_precision_that_the_outputs_do_not_show(dtype: torch.dtype | None) -> None:
    outputs = Inside(dtype)(torch.randn(5, 4))
    assert outputs.dtype == torch.float32
    assert has_half_precision(outputs) == (dtype is not None)
    assert has_half_precision(torch.zeros(()), outputs.sum()) == (dtype is not None)
    assert not has_half_precision(outputs.detach())
