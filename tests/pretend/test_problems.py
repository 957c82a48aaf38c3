"""On the pretend device, which is the default device, every problem's numbers are those of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import pretend
from expectations import expectation
from oracles import mapped
from test_differential import (
    AS_CAPTURED,
    DRIVERS,
    EVERY,
    EXACT,
    OTHERS,
    Step,
    assert_close,
    expected,
    of_names,
    plain,
    refusals_of,
)
from torch_secorder import FisherMonitor, fisher_report
from torch_secorder.autograd.double_precision import has_double_precision

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),  # re-entrant checkpoints
]
# What the device lacks, and not the library.
LACKING = {
    "embedding-sparse": "sparse tensors",
    "embedding-sparse_padding_idx": "sparse tensors",
}
ON_THE_DEVICE = of_names(*(name for name in OTHERS if name not in LACKING))


@contextmanager
def by_default(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def moved(step: Step) -> Step:
    """The same step on the device."""
    return replace(step, model=pretend.moved(step.model), batches=pretend.moved(step.batches))


@ON_THE_DEVICE
@pytest.mark.parametrize("driver", DRIVERS)
def test_problem(name: str, driver: str) -> None:
    right, setting = expected(name), EVERY[name].setting()
    step = moved(replace(plain(name), model=setting.model))
    with by_default("pretend"), expectation(refusals_of(name).get(driver, "")):
        assert_close(DRIVERS[driver](step), right, EXACT, driver)


@ON_THE_DEVICE
@pytest.mark.parametrize("driver", ["monitor", "report"])
def test_problem_on_a_device_without_float64(name: str, driver: str) -> None:
    """In float32, against the same in float32 on the CPU, which has float64 for the sums."""
    step = plain(name, torch.float32)
    with expectation(refusals_of(name).get(driver, "")):
        right = DRIVERS[driver](step)
    step = moved(replace(step, model=EVERY[name].setting(torch.float32).model))
    has_double_precision.cache_clear()
    try:
        with pretend.without_float64(), by_default("pretend"), expectation(refusals_of(name).get(driver, "")):
            assert_close(DRIVERS[driver](step), right, AS_CAPTURED, driver)
    finally:
        has_double_precision.cache_clear()


class TwoDevices(nn.Module):
    """The second half on another device than the first, as large models are."""

    def __init__(self, devices: tuple[str, str]) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.second = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3))
        self.devices = devices

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).to(self.devices[1]))


@pytest.mark.parametrize("devices", [("pretend:0", "pretend:1"), ("pretend:1", "cpu"), ("cpu", "pretend:1")], ids=str)
def test_a_model_on_several_devices(devices: tuple[str, str]) -> None:
    model, x, y = TwoDevices(("cpu", "cpu")).double(), torch.randn(5, 4).double(), torch.randn(5, 3).double()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum(1).mean()

    def by_monitor() -> dict[str, float]:
        with FisherMonitor(model, diagonal=True, per_sample=True, activations=True) as monitor:
            for _ in range(2):
                loss(model(x), y).backward()
        assert monitor.diagonal["second.1.weight"].device == model.second[1].weight.device
        return monitor.report()["fisher_trace"].to_dict()

    right, table = by_monitor(), fisher_report(model, loss, (x, y), progress=False)["fisher_trace"].to_dict()
    for half, device in zip((model.first, model.second), devices, strict=True):
        if device != "cpu":
            pretend.moved(half, torch.device(device).index)
    model.devices = devices
    x, y = (mapped(value, lambda t, device=device: t.to(device)) for value, device in zip((x, y), devices, strict=True))
    assert by_monitor() == pytest.approx(right, rel=EXACT)
    assert fisher_report(model, loss, (x, y), progress=False)["fisher_trace"].to_dict() == pytest.approx(
        table, rel=EXACT
    )
