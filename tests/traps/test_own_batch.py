"""Trap 4: layers with a batch axis that are called without the samples, on parameters or constants for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from problems._base import Forward
from traps.exactness import assert_exact, drawn

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Conv1d(4, 4, 3, padding=1),
    "circular convolution": lambda: nn.Conv1d(4, 4, 2, padding="same", padding_mode="circular"),
    "convolution with groups": lambda: nn.Conv1d(4, 4, 3, padding=2, dilation=2, groups=2, bias=False),
    "transposed convolution": lambda: nn.ConvTranspose1d(4, 4, 2, stride=2, padding=3, output_padding=1),
    "group norm of one group": lambda: nn.GroupNorm(1, 4),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "batch norm": lambda: nn.BatchNorm1d(4).eval(),
    "instance norm": lambda: nn.InstanceNorm1d(4, affine=True),
    "instance norm with running statistics": lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True).eval(),
    "layer norm": lambda: nn.LayerNorm(5),
    "linear": lambda: nn.Linear(5, 5),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("own", [1, 2, 4], ids="a batch of {}".format)
@pytest.mark.parametrize("trained", [True, False], ids=["parameter", "constant"])
@pytest.mark.parametrize("name", LAYERS)
def test_trap_04_a_layer_with_a_batch_axis_of_its_own(name: str, trained: bool, own: int) -> None:
    """Four is the number of channels too: a batch of four must not be taken for them."""

    def forward(m: Any, x: Tensor) -> Tensor:
        shared = m.layer(m.shared)
        return m.last((x[:, None] * shared + shared.tanh()).mean(1))

    model = Forward(forward, layer=LAYERS[name](), last=nn.Linear(5, 3))
    value = torch.randn(own, 4, 5)
    if trained:
        model.shared = nn.Parameter(value)
    else:
        model.register_buffer("shared", value)
    assert_exact(*drawn(model, 6, 4, 5))


def test_trap_04_a_layer_without_any_batch_axis() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.last(x * m.norm(m.convolution(m.shared)))

    layers = {"convolution": nn.Conv1d(4, 4, 3, padding=1), "norm": nn.InstanceNorm1d(4, affine=True)}
    model = Forward(forward, **layers, last=nn.Linear(5, 3))
    model.shared = nn.Parameter(torch.randn(4, 5))
    assert_exact(*drawn(model, 6, 4, 5))
