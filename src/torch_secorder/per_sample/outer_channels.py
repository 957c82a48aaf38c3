"""Sums of squares over channels of products over shared positions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_secorder.model.channels import ChannelSums
from torch_secorder.per_sample.arithmetic import cancellation_floor, joined, squared_norm_of_rows, total_of
from torch_secorder.per_sample.budget import chunks
from torch_secorder.per_sample.dense_answers import DenseAnswers
from torch_secorder.per_sample.profiles import profile_of

if TYPE_CHECKING:
    from torch_secorder.per_sample.outer import Outer


def are_features(form: Outer, channels: ChannelSums) -> bool:
    """Whether the channels are features of one of the factors, and the factors are real."""
    k, i, o = form.a.shape[1], form.a.shape[3], form.g.shape[3]
    inside = channels.axis == 0 or (channels.groups == k and i == math.prod(form.shape[1:]))
    return form.shape[0] == k * o and inside and not form.g.is_complex()


def channels_at_one_position(form: Outer, channels: ChannelSums) -> Tensor:
    """The sums over the samples too, ``[channels]``, of products at one position whose features are the channels."""
    f, h = _by_channel(form, channels)
    return _channels(form, (f.square() * squared_norm_of_rows(h)[..., None]).sum((0, 2))[None], channels)[0]


def sample_channels(form: Outer, channels: ChannelSums) -> Tensor:
    r"""The sums for each sample, ``[n, channels]``, without the product of both factors where that is cheaper.

    With ``f`` the factor whose features are the channels and ``h`` the other one, a channel's sum is
    ``sum_{t,s} f_t f_s (h_t . h_s)``, a product with h's Gram matrix, recomputed where it cancels.
    """
    # On an accelerator the host would have to wait to learn what cancels.
    if form.algorithm != "gram" or not are_features(form, channels) or not profile_of(form.like.device).has_caches:
        return _formed(form, channels)
    sums, magnitudes = _gram_by_feature(*_by_channel(form, channels))
    floor = cancellation_floor(form.g)
    features = (sums.sum(0) < floor * magnitudes.sum(0)).any(0)
    samples = sums.sum((1, 2)) < floor * magnitudes.sum((1, 2))
    if bool(features.any()):
        sums = sums.index_copy(2, some := features.nonzero().squeeze(1), _formed_by_feature(form, some, channels))
    found = _channels(form, sums, channels)
    if bool(samples.any()):
        some = samples.nonzero().squeeze(1)
        found = found.index_copy(0, some, _formed(form.select(some), channels))
    return found


def _formed(form: Outer, channels: ChannelSums) -> Tensor:
    """The sums of squares from the gradients themselves."""
    if not are_features(form, channels):
        return DenseAnswers.sample_channel_squares(form, channels)
    strips = (type(form)(strip.a, strip.g, (strip.shape[0], *form.shape[1:])) for strip in form.by_features())
    found = [DenseAnswers.sample_channel_squares(strip, channels) for strip in strips]
    if channels.axis:
        return total_of(found)
    return torch.cat([x.view(form.n, form.a.shape[1], -1) for x in found], 2).flatten(1)


def _formed_by_feature(form: Outer, some: Tensor, channels: ChannelSums) -> Tensor:
    """The sums of squares for some features of the factor with the channels, ``[n, k, features]``."""
    of_outputs = channels.axis == 0
    a, g = (form.a, form.g[..., some]) if of_outputs else (form.a[..., some], form.g)
    few = type(form)(a, g, (a.shape[1] * g.shape[3], a.shape[3]))
    return _formed(few, replace(channels, groups=a.shape[1])).view(form.n, a.shape[1], -1)


def _gram_by_feature(f: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_{t,s} f_t f_s (h_t . h_s)`` for each feature of f, ``[n, k, features]``, and its part with t = s."""
    n, k, t, features = f.shape
    sums, magnitudes = [], []
    for rows in chunks(n, k * t * (t + 2 * features) * f.dtype.itemsize, profile_of(f.device).chunk_bytes):
        part, gram = f[rows], h[rows] @ h[rows].mT
        sums.append(((gram @ part) * part).sum(2))
        magnitudes.append((part.square() * gram.diagonal(dim1=2, dim2=3)[..., None]).sum(2))
    return joined(sums), joined(magnitudes)


def _by_channel(form: Outer, channels: ChannelSums) -> tuple[Tensor, Tensor]:
    """The factor whose features are the channels, and the other one."""
    return (form.a, form.g) if channels.axis else (form.g, form.a)


def _channels(form: Outer, by_feature: Tensor, channels: ChannelSums) -> Tensor:
    """``[n, k, features]`` added up to ``[n, channels]``."""
    return (by_feature.unflatten(2, (form.shape[1], -1)).sum(3) if channels.axis else by_feature).flatten(1)
