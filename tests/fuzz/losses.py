"""Losses of several normalizations, each with the shares `[n]` that its value is the mean or the sum of.

Targets are of the kind that the loss reads: classes `[n]` for "pooled" and `[n, t]` for "tokens", of which -100 counts nowhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fuzz.registry import loss

Both = tuple[Tensor, Tensor]


def logits(out: Any) -> Tensor:
    return out["logits"] if isinstance(out, dict) else out


def tokens(out: Any) -> Tensor:
    return out["tokens"] if isinstance(out, dict) else out


def weights(like: Tensor) -> Tensor:
    return torch.tensor([0.2, 1.0, 3.0], dtype=like.dtype)


@loss("pooled")
def mean_of_samples(out: Any, y: Tensor) -> Both:
    return F.cross_entropy(logits(out), y), F.cross_entropy(logits(out), y, reduction="none")


@loss("pooled")
def sum_of_samples(out: Any, y: Tensor) -> Both:
    return F.cross_entropy(logits(out), y, reduction="sum"), F.cross_entropy(logits(out), y, reduction="none")


@loss("pooled")
def weighted_classes(out: Any, y: Tensor) -> Both:
    o, w = logits(out), weights(logits(out))
    return F.cross_entropy(o, y, w), F.cross_entropy(o, y, w, reduction="none") * len(y) / w[y].sum()


@loss("pooled")
def smoothed_labels(out: Any, y: Tensor) -> Both:
    o = logits(out)
    return F.cross_entropy(o, y, label_smoothing=0.1), F.cross_entropy(o, y, label_smoothing=0.1, reduction="none")


@loss("pooled")
def squared_error(out: Any, y: Tensor) -> Both:
    o, z = logits(out), F.one_hot(y, 3).to(logits(out).dtype)
    return F.mse_loss(o, z), (o - z).square().mean(1)


@loss("pooled")
def binary(out: Any, y: Tensor) -> Both:
    o, z = logits(out), F.one_hot(y, 3).to(logits(out).dtype)
    return (
        F.binary_cross_entropy_with_logits(o, z),
        F.binary_cross_entropy_with_logits(o, z, reduction="none").mean(1),
    )


@loss("tokens")
def mean_of_places(out: Any, y: Tensor) -> Both:
    o = tokens(out)
    per, keep = F.cross_entropy(o.mT, y, reduction="none"), (y >= 0).to(o.dtype)
    return F.cross_entropy(o.flatten(0, 1), y.flatten()), per.sum(1) * len(y) / keep.sum()


@loss("tokens")
def sum_of_places(out: Any, y: Tensor) -> Both:
    o = tokens(out)
    return F.cross_entropy(o.mT, y, reduction="sum"), F.cross_entropy(o.mT, y, reduction="none").sum(1)


@loss("tokens")
def each_sample_by_its_own_length(out: Any, y: Tensor) -> Both:
    o, keep = tokens(out), (y >= 0).to(tokens(out).dtype)
    shares = F.cross_entropy(o.mT, y, reduction="none").sum(1) / keep.sum(1).clamp(min=1)
    return shares.mean(), shares


@loss("tokens")
def squares_of_places(out: Any, y: Tensor) -> Both:
    return tokens(out).square().mean(), tokens(out).square().mean((1, 2))


@loss("tokens")
def last_place(out: Any, y: Tensor) -> Both:
    o, z = tokens(out)[:, -1], y[:, -1].clamp(min=0)
    return F.cross_entropy(o, z), F.cross_entropy(o, z, reduction="none")


@loss("pooled", coupled=True)
def square_of_the_batch_mean(out: Any, y: Tensor) -> Both:
    o = logits(out)
    return o.mean(0).square().sum(), (o * o.mean(0)).sum(1)


@loss("pooled", coupled=True)
def contrastive(out: Any, y: Tensor) -> Both:
    z = F.normalize(logits(out), dim=1)
    similar = z @ z.T * 3
    own = torch.arange(len(y))
    return F.cross_entropy(similar, own), F.cross_entropy(similar, own, reduction="none")


@loss("pooled", coupled=True)
def same_class_is_near(out: Any, y: Tensor) -> Both:
    o = logits(out)
    same = (y[:, None] == y) & ~torch.eye(len(y)).bool()
    shares = F.cross_entropy(o, y, reduction="none") + ((o[:, None] - o).square().sum(2) * same).sum(1)
    return shares.mean(), shares
