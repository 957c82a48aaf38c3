"""Layers in models: in-place operations, frozen parts, keywords, branches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from problems._base import Family, Forward, Problem, frozen, ids
from problems.sharing import TiedHead


class WithOutput(nn.Module):
    """Submodules called as a careless library might call its own attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(4, 4)
        self.inputs = nn.Linear(4, 4)
        self.activations = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.activations(self.inputs(x)).tanh())


class PlainSubclass(nn.Linear):
    """A Linear in every way but its name."""


def added_in_place(m: Any, x: Tensor) -> Tensor:
    h = m.one(x)
    h += x
    h.mul_(0.5)
    return m.two(h)


def by_keyword(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    h = m.norm(input=m.linear(input=x) + m.embedding(input=ids))
    h = m.conv(input=h.transpose(1, 2)).transpose(1, 2)
    return m.bilinear(input1=h, input2=m.prelu(input=h))


def keyword_layers() -> nn.Module:
    return Forward(
        by_keyword,
        linear=nn.Linear(3, 4),
        embedding=nn.Embedding(5, 4),
        norm=nn.LayerNorm(4),
        conv=nn.Conv1d(4, 4, 3, padding=1),
        prelu=nn.PReLU(),
        bilinear=nn.Bilinear(4, 4, 2),
    )


def attention(m: Any, x: Tensor) -> Tensor:
    heads = [h.unflatten(-1, (2, 3)).transpose(1, 2) for h in (m.query(x), m.key(x), m.value(x))]
    return x + m.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


def uses() -> Iterator[Problem]:
    family = Family("inplace")
    family.add("linear_2d", lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), (5, 4))
    family.add("linear_3d", lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), (5, 3, 4))
    family.add(
        "linear_3d_no_bias",
        lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(inplace=True), nn.Linear(6, 3)),
        (5, 3, 4),
    )
    family.add(
        "linear_4d", lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), (5, 3, 2, 4)
    )
    family.add(
        "conv", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1)), (4, 3, 5, 5)
    )
    family.add(
        "conv_circular",
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1)
        ),
        (4, 3, 5, 5),
    )
    family.add(
        "batch_norm", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)), (4, 3, 5, 5)
    )
    family.add("layer_norm", lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(inplace=True)), (4, 3, 4))
    family.add(
        "group_norm", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True)), (4, 3, 5, 5)
    )
    family.add(
        "instance_norm",
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ReLU(inplace=True)),
        (4, 3, 5, 5),
    )
    family.add(
        "embedding", lambda: nn.Sequential(nn.Embedding(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)), ids(4, 6)
    )
    family.add("conv_1d", lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(inplace=True)), (4, 3, 6))
    family.add(
        "conv_transpose", lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.ReLU(inplace=True)), (4, 3, 4, 4)
    )
    family.add("rms_norm", lambda: nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6), nn.ReLU(inplace=True)), (4, 3, 4))
    family.add("prelu", lambda: nn.Sequential(nn.Linear(4, 6), nn.PReLU(), nn.Hardtanh(inplace=True)), (4, 4))
    family.add(
        "bilinear_3d",
        lambda: Forward(lambda m, x: m.act(m.both(x, x)), both=nn.Bilinear(3, 3, 4), act=nn.ReLU(inplace=True)),
        (4, 2, 3),
    )
    family.add(
        "bilinear",
        lambda: Forward(lambda m, x: m.act(m.both(x, x)), both=nn.Bilinear(3, 3, 4), act=nn.ReLU(inplace=True)),
        (4, 3),
    )
    family.add("residual", lambda: Forward(added_in_place, one=nn.Linear(4, 4), two=nn.Linear(4, 3)), (5, 3, 4))

    family = Family("frozen", family.problems)
    three = lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3))  # noqa: E731
    family.add("first_layer", lambda: frozen(three(), "0.weight", "0.bias"), (5, 4))
    family.add("last_layer", lambda: frozen(three(), "3.weight", "3.bias"), (5, 4))
    family.add("first_weight", lambda: frozen(three(), "0.weight"), (5, 4))
    family.add("biases", lambda: frozen(three(), "0.bias", "2.bias", "3.bias"), (5, 4))
    family.add("weights", lambda: frozen(three(), "0.weight", "2.weight", "3.weight"), (5, 4))
    family.add("norm_weight", lambda: frozen(three(), "2.weight"), (5, 3, 4))
    family.add(
        "conv_weight",
        lambda: frozen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 1)), "0.weight"),
        (4, 3, 5, 5),
    )
    family.add(
        "conv_bias",
        lambda: frozen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 1)), "0.bias", "2.bias"),
        (4, 3, 5, 5),
    )
    family.add(
        "transposed_conv_weight",
        lambda: frozen(nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 1)), "0.weight"),
        (4, 3, 5, 5),
    )
    family.add("embedding", lambda: frozen(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)), "0.weight"), ids(4, 6))
    family.add(
        "bilinear_weight",
        lambda: frozen(
            nn.Sequential(Forward(lambda m, x: m.both(x, x), both=nn.Bilinear(3, 3, 4)), nn.Linear(4, 2)),
            "0.both.weight",
        ),
        (4, 3),
    )
    family.add(
        "prelu", lambda: frozen(nn.Sequential(nn.Linear(4, 4), nn.PReLU(4), nn.Linear(4, 2)), "1.weight"), (4, 4)
    )
    family.add("tied_head", lambda: frozen(TiedHead(bias=True), "embedding.weight"), ids(4, 6, vocabulary=7))

    family = Family("use", family.problems)
    family.add("submodule_called_output", WithOutput, (5, 3, 4))
    family.add(
        "layers_by_keyword", keyword_layers, lambda: {"x": torch.randn(4, 6, 3), "ids": torch.randint(5, (4, 6))}
    )
    family.add(
        "tuple_inputs",
        lambda: Forward(lambda m, x, y: m.one(x) * m.two(y).tanh(), one=nn.Linear(4, 3), two=nn.Linear(2, 3)),
        lambda: (torch.randn(5, 4), torch.randn(5, 2)),
    )
    family.add(
        "mapping_inputs",
        lambda: Forward(lambda m, x, mask: m.one(x).tanh() * mask, one=nn.Linear(4, 3)),
        lambda: {"x": torch.randn(5, 4), "mask": torch.rand(5, 3)},
    )
    family.add("subclass", lambda: nn.Sequential(PlainSubclass(4, 3), nn.Tanh(), PlainSubclass(3, 2)), (5, 4))
    family.add(
        "unused_layer", lambda: Forward(lambda m, x: m.used(x), unused=nn.Linear(4, 3), used=nn.Linear(4, 3)), (5, 4)
    )
    family.add(
        "dead_branch",
        lambda: Forward(lambda m, x: m.one(x).detach() + m.two(x), one=nn.Linear(4, 3), two=nn.Linear(4, 3)),
        (5, 4),
    )
    family.add(
        "last_position_only",
        lambda: Forward(lambda m, x: m.two(m.one(x).tanh())[:, -1], one=nn.Linear(4, 3), two=nn.Linear(3, 3)),
        (5, 6, 4),
    )
    family.add(
        "output_used_twice",
        lambda: Forward(lambda m, x: m.two(h := m.one(x)) * h.tanh(), one=nn.Linear(4, 3), two=nn.Linear(3, 3)),
        (5, 4),
    )
    family.add(
        "residual",
        lambda: Forward(lambda m, x: x + m.two(m.one(x).relu()), one=nn.Linear(4, 8), two=nn.Linear(8, 4)),
        (5, 3, 4),
    )
    family.add(
        "attention",
        lambda: Forward(
            attention, query=nn.Linear(6, 6), key=nn.Linear(6, 6), value=nn.Linear(6, 6), out=nn.Linear(6, 6)
        ),
        (4, 5, 6),
    )
    family.add("one_submodule_is_the_model", lambda: nn.Linear(4, 3), (5, 4))
    family.add("vision_net", vision_net, (4, 2, 8, 8))
    return iter(family.problems)


def vision_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.GroupNorm(3, 6),
        nn.PReLU(6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
