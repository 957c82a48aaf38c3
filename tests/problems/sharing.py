"""Tied parameters, and modules called more than once in one forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from problems._base import Family, Forward, Problem, ids


class TiedHead(nn.Module):
    """A language model's usual tie: the output layer's weight is the embedding's."""

    def __init__(self, bias: bool = False, padding_idx: int | None = None, width: int = 4, words: int = 7):
        super().__init__()
        self.embedding = nn.Embedding(words, width, padding_idx=padding_idx)
        self.block = nn.Linear(width, width)
        self.head = nn.Linear(width, words, bias=bias)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(ids)).tanh())


def tied(first: Callable[[], nn.Module], second: Callable[[], nn.Module], *names: str) -> nn.Module:
    """first -> tanh -> second, sharing the parameters named."""
    model = nn.Sequential(first(), nn.Tanh(), second())
    for name in names:
        setattr(model[2], name, getattr(model[0], name))
    return model


def shared() -> Iterator[Problem]:
    family = Family("tied")
    family.add("embedding_and_head", TiedHead, ids(4, 6, vocabulary=7))
    family.add("embedding_and_head_with_bias", partial(TiedHead, bias=True), ids(4, 6, vocabulary=7))
    family.add("embedding_and_head_with_padding", partial(TiedHead, padding_idx=1), ids(4, 6, vocabulary=7))
    family.add("wide_embedding_and_head", partial(TiedHead, width=20, words=30), ids(4, 3, vocabulary=30))
    family.add("embedding_and_head_one_position", TiedHead, ids(5, vocabulary=7))
    for name, names in {"weight": ("weight",), "bias": ("bias",), "weight_and_bias": ("weight", "bias")}.items():
        family.add(f"linear_{name}", partial(tied, partial(nn.Linear, 4, 4), partial(nn.Linear, 4, 4), *names), (5, 4))
        family.add(
            f"linear_3d_{name}", partial(tied, partial(nn.Linear, 4, 4), partial(nn.Linear, 4, 4), *names), (5, 3, 4)
        )
    family.add(
        "conv_of_two_paddings",
        partial(tied, partial(nn.Conv2d, 3, 3, 3, padding=1), partial(nn.Conv2d, 3, 3, 3, stride=2), "weight"),
        (3, 3, 6, 6),
    )
    family.add(
        "conv_grouped",
        partial(
            tied,
            partial(nn.Conv2d, 4, 4, 3, groups=2),
            partial(nn.Conv2d, 4, 4, 3, groups=2, dilation=2),
            "weight",
            "bias",
        ),
        (3, 4, 8, 8),
    )
    family.add(
        "conv_and_transpose",
        partial(tied, partial(nn.Conv2d, 3, 3, 3), partial(nn.ConvTranspose2d, 3, 3, 3), "weight"),
        (3, 3, 6, 6),
    )
    family.add(
        "conv_and_transpose_oblong",
        partial(tied, partial(nn.Conv2d, 3, 5, 3), partial(nn.ConvTranspose2d, 5, 3, 3), "weight"),
        (3, 3, 6, 6),
    )
    family.add("conv_and_linear_biases", lambda: tied_biases(), (3, 3, 6, 6))
    family.add(
        "layer_norms",
        partial(tied, partial(nn.LayerNorm, 4), partial(nn.LayerNorm, 4, eps=0.1), "weight", "bias"),
        (5, 3, 4),
    )
    family.add("norm_weight_and_linear_bias", lambda: tied_norm_and_bias(), (5, 3, 4))
    family.add("two_embeddings", lambda: two_embeddings(), lambda: (torch.randint(5, (4, 6)), torch.randint(5, (4, 3))))
    family.add("three_linears", lambda: three_linears(), (5, 4))

    family = Family("reused", family.problems)
    family.add(
        "linear_three_times",
        lambda: Forward(lambda m, x: m.layer(m.layer(m.layer(x).tanh()).tanh()), layer=nn.Linear(4, 4)),
        (5, 4),
    )
    family.add(
        "linear_three_times_3d",
        lambda: Forward(lambda m, x: m.layer(m.layer(m.layer(x).tanh()).tanh()), layer=nn.Linear(4, 4)),
        (5, 3, 4),
    )
    family.add(
        "wide_linear_twice",
        lambda: Forward(lambda m, x: m.layer(m.layer(x).tanh()), layer=nn.Linear(24, 24)),
        (3, 2, 24),
    )
    family.add(
        "linear_on_2d_and_3d",
        lambda: Forward(lambda m, x: m.layer(x).tanh() * m.layer(x.mean(1)).tanh().unsqueeze(1), layer=nn.Linear(4, 4)),
        (5, 3, 4),
    )
    family.add("linear_once_and_again_under_no_grad", lambda: Forward(no_grad_too, layer=nn.Linear(4, 4)), (5, 4))
    family.add(
        "conv_once_and_again_under_no_grad",
        lambda: Forward(no_grad_too, layer=nn.Conv2d(3, 3, 3, padding=1)),
        (4, 3, 5, 5),
    )
    family.add("linear_once_and_again_in_vain", lambda: Forward(in_vain, layer=nn.Linear(4, 4)), (5, 4))
    family.add(
        "linear_on_a_detached_branch",
        lambda: Forward(lambda m, x: m.layer(x).tanh() * m.layer(x).detach(), layer=nn.Linear(4, 4)),
        (5, 4),
    )
    family.add(
        "conv_on_two_sizes",
        lambda: Forward(
            lambda m, x: m.layer(x).mean((2, 3)) + m.layer(x[..., ::2]).tanh().sum((2, 3)), layer=nn.Conv2d(3, 4, 3)
        ),
        (3, 3, 6, 8),
    )
    family.add(
        "conv_depthwise_twice",
        lambda: Forward(lambda m, x: m.layer(m.layer(x).tanh()), layer=nn.Conv2d(3, 3, 3, padding=1, groups=3)),
        (3, 3, 5, 5),
    )
    family.add(
        "conv_transpose_twice",
        lambda: Forward(lambda m, x: m.layer(m.layer(x).tanh()), layer=nn.ConvTranspose2d(3, 3, 3, padding=1)),
        (3, 3, 5, 5),
    )
    family.add(
        "embedding_on_two_shapes",
        lambda: Forward(lambda m, a, b: m.layer(a).mean(1) * m.layer(b).tanh(), layer=nn.Embedding(5, 4)),
        lambda: (torch.randint(5, (4, 6)), torch.randint(5, (4,))),
    )
    family.add(
        "layer_norm_twice",
        lambda: Forward(lambda m, x: m.norm(m.layer(m.norm(x)).tanh()), norm=nn.LayerNorm(4), layer=nn.Linear(4, 4)),
        (5, 3, 4),
    )
    family.add(
        "batch_norm_twice", lambda: Forward(lambda m, x: m.norm(m.norm(x).tanh()), norm=nn.BatchNorm2d(3)), (4, 3, 2, 2)
    )
    family.add("prelu_twice", lambda: nn.Sequential(nn.Linear(4, 4), *[nn.PReLU(4)] * 2), (5, 4))
    family.add(
        "prelu_on_two_shapes",
        lambda: Forward(lambda m, x: m.act(x).sum(2) + m.act(x[:, :, 0]), act=nn.PReLU()),
        (5, 4, 3),
    )
    family.add(
        "bilinear_twice",
        lambda: Forward(lambda m, x: m.both(m.both(x, x.flip(-1)).tanh(), x), both=nn.Bilinear(3, 3, 3)),
        (4, 3),
    )
    family.add("under_two_names", under_two_names, (5, 4))
    return iter(family.problems)


def tied_biases() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 4))
    model[3].bias = model[0].bias
    return model


def tied_norm_and_bias() -> nn.Module:
    model = nn.Sequential(nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 4))
    model[2].bias = model[0].weight
    return model


def two_embeddings() -> nn.Module:
    model = Forward(
        lambda m, a, b: m.one(a).mean(1) * m.two(b).sum(1),
        one=nn.Embedding(5, 4),
        two=nn.Embedding(5, 4, padding_idx=2),
    )
    model.two.weight = model.one.weight
    return model


def three_linears() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4))
    model[4].weight = model[2].weight = model[0].weight
    return model


def no_grad_too(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = m.layer(x)
    return m.layer(x).tanh() * scale


def in_vain(m: Any, x: Tensor) -> Tensor:
    m.layer(x * 3)
    return m.layer(x).tanh()


def under_two_names() -> nn.Module:
    layer = nn.Linear(4, 4)
    return Forward(lambda m, x: m.one(m.two(x).tanh()), one=layer, two=layer)
