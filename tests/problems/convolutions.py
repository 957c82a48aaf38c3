"""Convolutions and their transposes, with all of their settings."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from problems._base import Family, Forward, Problem

SIZES = {1: (9,), 2: (7, 6), 3: (5, 4, 4)}

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "stride": {"stride": 2},
    "stride_beyond_kernel": {"kernel_size": 2, "stride": 3},
    "padding": {"padding": 1},
    "padding_and_stride": {"padding": 2, "stride": 2},
    "dilation": {"kernel_size": 2, "dilation": 2},
    "dilation_padding_stride": {"dilation": 2, "padding": 2, "stride": 2},
    "groups": {"groups": 2},
    "groups_no_bias_padding": {"groups": 2, "padding": 1, "bias": False},
    "depthwise": {"groups": 4, "out_channels": 4},
    "depthwise_multiplier": {"groups": 4, "out_channels": 8, "stride": 2},
    "kernel_1": {"kernel_size": 1},
    "valid": {"padding": "valid"},
    "same": {"padding": "same"},
    "same_even": {"padding": "same", "kernel_size": 2},
    "same_even_dilated": {"padding": "same", "kernel_size": 4, "dilation": 1},
    "same_dilated": {"padding": "same", "kernel_size": 2, "dilation": 2},
    "same_even_groups": {"padding": "same", "kernel_size": 2, "groups": 2},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "circular_stride_groups": {"padding": 2, "padding_mode": "circular", "stride": 2, "groups": 2},
    "circular_same_even": {"padding": "same", "padding_mode": "circular", "kernel_size": 2},
    "reflect_same_even": {"padding": "same", "padding_mode": "reflect", "kernel_size": 2},
    "replicate_dilated": {"padding": 2, "padding_mode": "replicate", "dilation": 2},
}

TRANSPOSED: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "stride": {"stride": 2},
    "padding": {"padding": 1},
    "output_padding": {"stride": 2, "output_padding": 1},
    "dilation": {"dilation": 2},
    "dilation_output_padding": {"dilation": 2, "output_padding": 1},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "out_channels": 4, "stride": 2},
    "kernel_1": {"kernel_size": 1},
    "everything": {"stride": 2, "padding": 2, "output_padding": 1, "groups": 2, "dilation": 2, "bias": False},
}


def convolution(layer: type[nn.Module], settings: dict[str, Any]) -> nn.Module:
    arguments = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **settings}
    return nn.Sequential(layer(**arguments), nn.Tanh())


def convolutions() -> Iterator[Problem]:
    family = Family("conv")
    for d, layer in {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}.items():
        for name, settings in CONVOLUTIONS.items():
            family.add(f"{d}d-{name}", partial(convolution, layer, settings), (3, 4, *SIZES[d]))
    for name, settings in {
        "oblong": {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0), "dilation": (1, 2)},
        "oblong_circular": {"kernel_size": (3, 2), "padding": (2, 1), "padding_mode": "circular"},
        "oblong_same": {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)},
        "whole_image": {"kernel_size": (7, 6)},
        "one_channel": {"in_channels": 4, "out_channels": 1},
    }.items():
        family.add(f"2d-{name}", partial(convolution, nn.Conv2d, settings), (3, 4, 7, 6))
    family.add("2d-many_channels_on_small_map", partial(nn.Conv2d, 24, 20, 3, padding=1), (3, 24, 3, 3))
    family.add("2d-many_channels_in_groups", partial(nn.Conv2d, 24, 40, 3, padding=1, groups=2), (3, 24, 2, 2))
    family.add("2d-few_channels_on_large_map", partial(nn.Conv2d, 2, 2, 3), (2, 2, 20, 20))
    family.add("2d-one_sample", partial(nn.Conv2d, 4, 6, 3), (1, 4, 6, 6))
    family.add(
        "2d-channels_last",
        lambda: Forward(lambda m, x: m.layer(x.to(memory_format=torch.channels_last)), layer=nn.Conv2d(4, 6, 3)),
        (3, 4, 6, 6),
        no_vmap="memory formats",
    )
    family.add(
        "2d-deep",
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 5, 3),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(20, 3),
        ),
        (4, 2, 8, 8),
    )
    return iter(family.problems)


def transposed_convolutions() -> Iterator[Problem]:
    family = Family("conv_transpose")
    for d, layer in {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}.items():
        for name, settings in TRANSPOSED.items():
            family.add(f"{d}d-{name}", partial(convolution, layer, settings), (3, 4, *SIZES[d][:1], *(3,) * (d - 1)))
    family.add("2d-many_channels_on_small_map", partial(nn.ConvTranspose2d, 24, 20, 3), (3, 24, 2, 2))
    oblong = {"kernel_size": (3, 2), "stride": (1, 3), "padding": (2, 0), "output_padding": (0, 2), "dilation": (1, 2)}
    family.add("2d-oblong", partial(convolution, nn.ConvTranspose2d, oblong), (3, 4, 7, 6))
    family.add(
        "2d-output_size",
        lambda: Forward(
            lambda m, x: m.layer(x, output_size=(10, 8)).tanh(), layer=nn.ConvTranspose2d(4, 6, 3, stride=2)
        ),
        (3, 4, 4, 3),
    )
    family.add(
        "2d-deep",
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, stride=2), nn.Tanh(), nn.ConvTranspose2d(4, 2, 3, stride=2)),
        (3, 2, 7, 7),
    )
    return iter(family.problems)
