"""Linear layers, embeddings, norms and the rest, with all of their settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from oracles import Inputs
from problems._base import Family, Forward, Problem, ids


def linear() -> Iterator[Problem]:
    family = Family("linear")
    for bias in (True, False):
        suffix = "" if bias else "-no_bias"
        family.add(f"2d{suffix}", partial(nn.Linear, 4, 3, bias=bias), (5, 4))
        family.add(f"3d{suffix}", partial(nn.Linear, 4, 3, bias=bias), (3, 6, 4))
        family.add(f"4d{suffix}", partial(nn.Linear, 4, 3, bias=bias), (3, 2, 5, 4))
        family.add(f"5d{suffix}", partial(nn.Linear, 4, 3, bias=bias), (3, 2, 2, 3, 4))
    family.add("one_sample", partial(nn.Linear, 4, 3), (1, 4))
    family.add("one_sample_3d", partial(nn.Linear, 4, 3), (1, 6, 4))
    family.add("one_output", partial(nn.Linear, 4, 1), (5, 4))
    family.add("one_input", partial(nn.Linear, 1, 3), (5, 4, 1))
    family.add("wide_with_few_positions", partial(nn.Linear, 24, 20), (3, 2, 24))
    family.add("narrow_with_many_positions", partial(nn.Linear, 3, 2), (3, 40, 3))
    family.add("as_many_samples_as_positions", partial(nn.Linear, 4, 3), (5, 5, 4))
    family.add("one_position", partial(nn.Linear, 4, 3), (5, 1, 4))
    family.add(
        "transposed_input",
        lambda: Forward(lambda m, x: m.layer(x.transpose(1, 2)), layer=nn.Linear(6, 3)),
        (3, 6, 4),
    )
    family.add(
        "expanded_input",
        lambda: Forward(lambda m, x: m.layer(x.unsqueeze(1).expand(-1, 4, -1)).tanh(), layer=nn.Linear(6, 3)),
        (3, 6),
    )
    family.add(
        "expanded_grad_output",
        lambda: Forward(lambda m, x: m.layer(x).sum(1), layer=nn.Linear(6, 3)),
        (3, 4, 6),
    )
    family.add(
        "deep", lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 2)), (5, 4)
    )
    family.add(
        "deep_3d",
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 6)),
        (4, 5, 4),
    )
    return iter(family.problems)


def embeddings() -> Iterator[Problem]:
    family = Family("embedding")
    family.add("one_id", partial(nn.Embedding, 5, 4), ids(6))
    family.add("repeated_ids", partial(nn.Embedding, 5, 4), ids(4, 9))
    family.add("distinct_ids", partial(nn.Embedding, 50, 4), lambda: torch.randperm(50)[:20].reshape(4, 5))
    family.add("long", partial(nn.Embedding, 5, 4), ids(3, 200))
    family.add("ids_of_3_axes", partial(nn.Embedding, 5, 4), ids(4, 3, 6))
    family.add("padding_idx", partial(nn.Embedding, 5, 4, padding_idx=0), ids(4, 9))
    family.add("padding_idx_negative", partial(nn.Embedding, 5, 4, padding_idx=-1), ids(4, 9))
    family.add("only_padding", partial(nn.Embedding, 5, 4, padding_idx=2), lambda: torch.tensor([[2, 2, 2], [2, 1, 1]]))
    family.add("int32_ids", partial(nn.Embedding, 5, 4), lambda: torch.randint(5, (4, 9), dtype=torch.int32))
    family.add("sparse", partial(nn.Embedding, 5, 4, sparse=True), ids(4, 9), no_vmap="sparse gradients")
    family.add(
        "sparse_padding_idx",
        partial(nn.Embedding, 5, 4, sparse=True, padding_idx=1),
        ids(4, 9),
        no_vmap="sparse gradients",
    )
    family.add("deep", lambda: nn.Sequential(nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 3), nn.Tanh()), ids(4, 9))
    family.add(
        "same_ids_in_every_sample",
        lambda: nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.Tanh()),
        lambda: torch.tensor([[0, 1, 1]] * 4),
    )
    return iter(family.problems)


def norms() -> Iterator[Problem]:
    family = Family("norm")

    def middle(
        features: int, norm: Callable[[], nn.Module], channels_first: bool = False, d: int = 2
    ) -> Callable[[], nn.Module]:
        """The norm between two other layers, the first of which has parameters of its own."""
        if not channels_first:
            return lambda: nn.Sequential(nn.Linear(4, features), norm(), nn.Tanh(), nn.Linear(features, 3))
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[d]
        return lambda: nn.Sequential(conv(4, features, 1), norm(), nn.Tanh())

    for shape in ((4, 4), (4, 5, 4), (4, 2, 3, 4)):
        family.add(f"layer-{len(shape)}d", middle(6, lambda: nn.LayerNorm(6)), shape)
        family.add(f"rms-{len(shape)}d", middle(6, lambda: nn.RMSNorm(6, eps=1e-5)), shape)
    family.add("layer-eps", middle(6, lambda: nn.LayerNorm(6, eps=0.3)), (4, 5, 4))
    family.add("layer-no_bias", middle(6, lambda: nn.LayerNorm(6, bias=False)), (4, 5, 4))
    family.add("layer-no_affine", middle(6, lambda: nn.LayerNorm(6, elementwise_affine=False)), (4, 5, 4))
    family.add("layer-two_axes", middle(6, lambda: nn.LayerNorm((5, 6), eps=0.1)), (4, 5, 4))
    family.add("layer-two_axes_and_a_middle_one", middle(6, lambda: nn.LayerNorm((5, 6), bias=False)), (4, 3, 5, 4))
    family.add("layer-only", partial(nn.LayerNorm, (2, 3, 4)), (4, 2, 3, 4))
    family.add("rms-eps", middle(6, lambda: nn.RMSNorm(6, eps=0.3)), (4, 5, 4))
    family.add("rms-default_eps", middle(6, lambda: nn.RMSNorm(6)), (4, 5, 4))
    family.add("rms-two_axes", middle(6, lambda: nn.RMSNorm((5, 6), eps=0.1)), (4, 3, 5, 4))
    family.add("rms-no_affine", middle(6, lambda: nn.RMSNorm(6, elementwise_affine=False)), (4, 5, 4))
    family.add("group-2d", middle(6, lambda: nn.GroupNorm(2, 6)), (4, 4))
    family.add("group-3d", middle(6, lambda: nn.GroupNorm(2, 6), True, 1), (4, 4, 7))
    family.add("group-4d", middle(6, lambda: nn.GroupNorm(3, 6, eps=0.3), True), (4, 4, 3, 5))
    family.add("group-one_group", middle(6, lambda: nn.GroupNorm(1, 6), True), (4, 4, 3, 5))
    family.add("group-one_channel_each", middle(6, lambda: nn.GroupNorm(6, 6), True), (4, 4, 3, 5))
    family.add("group-no_affine", middle(6, lambda: nn.GroupNorm(3, 6, affine=False), True), (4, 4, 3, 5))
    for d, (instance, batch) in {
        1: (nn.InstanceNorm1d, nn.BatchNorm1d),
        2: (nn.InstanceNorm2d, nn.BatchNorm2d),
        3: (nn.InstanceNorm3d, nn.BatchNorm3d),
    }.items():
        shape = (4, 4, *(3,) * (d - 1), 5)
        family.add(f"instance-{d}d", middle(6, partial(instance, 6, affine=True), True, d), shape)
        family.add(
            f"instance-{d}d-train", middle(6, partial(instance, 6, affine=True, eps=0.3), True, d), shape, training=True
        )
        family.add(f"instance-{d}d-no_affine", middle(6, partial(instance, 6), True, d), shape)
        family.add(
            f"instance-{d}d-running_eval",
            middle(6, partial(instance, 6, affine=True, track_running_stats=True, eps=0.3), True, d),
            shape,
        )
        family.add(
            f"instance-{d}d-running_train",
            middle(6, partial(instance, 6, affine=True, track_running_stats=True), True, d),
            shape,
            training=True,
            no_vmap="updates running statistics",
        )
        family.add(f"batch-{d}d", middle(6, partial(batch, 6), True, d), shape)
        family.add(f"batch-{d}d-eps", middle(6, partial(batch, 6, eps=0.3), True, d), shape)
        family.add(f"batch-{d}d-no_affine", middle(6, partial(batch, 6, affine=False), True, d), shape)
    family.add("batch-1d-on_2d", middle(6, lambda: nn.BatchNorm1d(6, eps=0.3)), (4, 4))
    return iter(family.problems)


def activations_and_bilinear() -> Iterator[Problem]:
    family = Family("prelu")
    for shape in ((5, 4), (5, 4, 3), (3, 4, 3, 5)):
        for count in (1, 4):
            family.add(f"{len(shape)}d-{count}", lambda count=count: nn.PReLU(count), shape)  # type: ignore[misc]
    family.add(
        "deep", lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.PReLU(4), nn.Conv2d(4, 3, 1), nn.PReLU()), (4, 2, 5, 5)
    )
    bilinear = Family("bilinear")

    def two(*middle: int) -> Callable[[], Inputs]:
        return lambda: (torch.randn(4, *middle, 3), torch.randn(4, *middle, 5))

    for name, middle in {"2d": (), "3d": (6,), "4d": (2, 3)}.items():
        bilinear.add(name, partial(nn.Bilinear, 3, 5, 2), two(*middle))
    bilinear.add("wide", partial(nn.Bilinear, 12, 12, 20), lambda: (torch.randn(3, 2, 12), torch.randn(3, 2, 12)))
    bilinear.add("no_bias", partial(nn.Bilinear, 3, 5, 2, bias=False), two())
    bilinear.add("no_bias_3d", partial(nn.Bilinear, 3, 5, 2, bias=False), two(6))
    bilinear.add(
        "deep",
        lambda: Forward(
            lambda m, x: m.both(m.left(x).tanh(), m.right(x).tanh()),
            left=nn.Linear(4, 3),
            right=nn.Linear(4, 5),
            both=nn.Bilinear(3, 5, 2),
        ),
        (4, 6, 4),
    )
    return iter([*family.problems, *bilinear.problems])
