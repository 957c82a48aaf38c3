"""Uses that no layer's own forward accounts for, or whose samples are not where one expects them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from problems._base import Family, Forward, Problem, ids


class OtherForward(nn.Linear):
    """Looks like a Linear to isinstance, and is not one."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * 2, self.bias).square()


class RawParameter(nn.Module):
    """A learned offset, without a batch axis, added to every sample."""

    def __init__(self, *shape: int):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(shape))
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + self.offset).tanh()


class Positions(nn.Module):
    """Tokens plus positions, whose ids have no batch axis, or one of length 1."""

    def __init__(self, batch_axis: bool, dropout: bool = False):
        super().__init__()
        self.tokens, self.positions, self.layer = nn.Embedding(5, 4), nn.Embedding(6, 4), nn.Linear(4, 3)
        self.batch_axis, self.dropout = batch_axis, nn.Dropout(0.0) if dropout else nn.Identity()

    def forward(self, ids: Tensor) -> Tensor:
        steps = torch.arange(ids.shape[1])
        positions = self.positions(steps[None] if self.batch_axis else steps)
        return self.layer((self.tokens(ids) + self.dropout(positions)).tanh())


def patched() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    layer = model[0]
    layer.forward = MethodType(lambda self, x: F.linear(x.flip(-1), self.weight, self.bias), layer)
    return model


def pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    prune.random_unstructured(model[0], "weight", 0.5)
    return model


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    parametrize.register_parametrization(model[0], "weight", Doubled())
    return model


def weight_normed() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 2))


def checkpointed(use_reentrant: bool) -> Callable[[], nn.Module]:
    from torch.utils.checkpoint import checkpoint

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.last(checkpoint(m.body, m.first(x).tanh(), use_reentrant=use_reentrant))

    return lambda: Forward(
        forward,
        first=nn.Linear(4, 4),
        body=nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)),
        last=nn.Linear(4, 2),
    )


def folded_windows(m: Any, x: Tensor) -> Tensor:
    """Two windows per sample folded into the batch axis, as Swin does: the layer's batch is not the samples'."""
    return m.layer(x.unflatten(1, (2, 2)).flatten(0, 1)).unflatten(0, (len(x), 2)).flatten(1).tanh()


def awkward() -> Iterator[Problem]:
    family = Family("awkward")
    family.add(
        "linear_by_the_embedding",
        lambda: Forward(
            lambda m, i: F.linear(m.layer(m.embedding(i)).tanh(), m.embedding.weight),
            embedding=nn.Embedding(5, 4),
            layer=nn.Linear(4, 4),
        ),
        ids(4, 6),
    )
    family.add(
        "transposed_decoder",
        lambda: Forward(lambda m, x: F.linear(m.layer(x).tanh(), m.layer.weight.t()), layer=nn.Linear(4, 3)),
        (5, 4),
    )
    family.add(
        "functional_only",
        lambda: Forward(lambda m, x: F.linear(x, m.layer.weight, m.layer.bias).tanh(), layer=nn.Linear(4, 3)),
        (5, 4),
    )
    family.add(
        "weight_in_the_loss",
        lambda: Forward(lambda m, x: m.layer(x) + m.layer.weight.square().sum(), layer=nn.Linear(4, 3)),
        (5, 4),
    )
    family.add("other_forward", lambda: nn.Sequential(OtherForward(4, 3), nn.Linear(3, 2)), (5, 4))
    family.add("patched_forward", patched, (5, 4))
    family.add("pruned", pruned, (5, 4))
    family.add("parametrized", parametrized, (5, 4))
    family.add("weight_normed", weight_normed, (5, 4))
    family.add("raw_parameter", partial(RawParameter, 4), (5, 4))
    family.add("raw_parameter_of_batch_length", partial(RawParameter, 4, 4), (4, 4, 4))
    family.add("positions_of_batch_1", partial(Positions, True), ids(4, 6))
    family.add("positions_without_batch", partial(Positions, False), ids(4, 6))
    family.add("positions_without_batch_as_many_as_samples", partial(Positions, False), ids(6, 6))
    family.add("positions_of_batch_1_in_a_batch_of_1", partial(Positions, True), ids(1, 6))
    family.add("positions_after_dropout", partial(Positions, True, True), ids(4, 6))
    family.add(
        "sequence_first",
        lambda: Forward(lambda m, x: m.layer(x.transpose(0, 1)).transpose(0, 1).tanh(), layer=nn.Linear(4, 3)),
        (5, 6, 4),
    )
    family.add(
        "sequence_first_square",
        lambda: Forward(lambda m, x: m.layer(x.transpose(0, 1)).transpose(0, 1).tanh(), layer=nn.Linear(4, 3)),
        (5, 5, 4),
    )
    family.add("windows_in_the_batch", lambda: Forward(folded_windows, layer=nn.Linear(3, 2)), (5, 4, 3))
    family.add(
        "batch_folded_into_rows",
        lambda: Forward(lambda m, x: m.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]).tanh(), layer=nn.Linear(4, 3)),
        (5, 6, 4),
    )
    family.add(
        "linear_on_one_vector", lambda: Forward(lambda m, x: x * m.layer(x.new_ones(4)), layer=nn.Linear(4, 4)), (4, 4)
    )
    family.add(
        "unbatched_conv",
        lambda: Forward(lambda m, x: torch.stack([m.layer(image) for image in x]), layer=nn.Conv2d(4, 4, 3)),
        (4, 4, 5, 5),
    )
    family.add(
        "multihead_attention",
        lambda: Forward(lambda m, x: m.attention(x, x, x)[0], attention=nn.MultiheadAttention(4, 2, batch_first=True)),
        (3, 5, 4),
    )
    family.add(
        "lstm",
        lambda: Forward(
            lambda m, x: m.layer(m.lstm(x)[0]), lstm=nn.LSTM(4, 3, batch_first=True), layer=nn.Linear(3, 2)
        ),
        (3, 5, 4),
    )
    family.add("embedding_of_max_norm", lambda: nn.Embedding(5, 4, max_norm=0.5), ids(4, 9))
    family.add("embedding_bag", lambda: nn.EmbeddingBag(5, 4), ids(4, 6))
    family.add("checkpointed", checkpointed(use_reentrant=False), (5, 4))
    family.add("checkpointed_reentrant", checkpointed(use_reentrant=True), (5, 4))
    family.add("lazy_linear", lambda: nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.Linear(3, 2)), (5, 4))
    family.add(
        "flipped_batch",
        lambda: Forward(lambda m, x: m.two(m.one(x.flip(0)).tanh().flip(0)), one=nn.Linear(4, 3), two=nn.Linear(3, 2)),
        (5, 4),
    )
    return iter(family.problems)
