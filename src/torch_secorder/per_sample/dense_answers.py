"""What every form answers, here from the gradients themselves, for a few samples at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from torch_secorder.model.channels import ChannelSums
from torch_secorder.per_sample.arithmetic import (
    in_rows,
    joined,
    one_direction,
    real_entries,
    squared_norm_of_rows,
    squares_of_columns,
    total_of,
    zeroed,
)
from torch_secorder.per_sample.budget import chunks
from torch_secorder.per_sample.profiles import profile_of

if TYPE_CHECKING:
    from torch_secorder.per_sample._base import PerSampleGradient

Index = slice | Tensor
# Squared norms in which digits may have cancelled, and the sizes of the summands; the sizes are None if nothing can cancel.
Unguarded = tuple[Tensor, Tensor | None]


class DenseAnswers(ABC):
    """The answers about the gradients of one parameter for each of N samples, from their dense tensor.

    Attributes:
        n: the number of samples N.
        shape: the parameter's shape.
        algorithm: how :meth:`squared_norm` is computed, for the report.
        sparse: whether even one sample's dense gradient is far larger than its factors.
    """

    n: int
    shape: tuple[int, ...]
    algorithm: str = "dense"
    sparse: bool = False

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """A tensor with the dtype and the device of every result."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of every result."""
        return self.like.dtype

    @abstractmethod
    def dense(self) -> Tensor:
        """The gradients themselves, ``[n, *shape]``."""

    @abstractmethod
    def select(self, samples: Index) -> PerSampleGradient:
        """The gradients of some of the samples, given by a slice or an index tensor."""

    def squared_norm(self) -> Tensor:
        """``sum of G_n ** 2`` over the parameter's entries, ``[n]``."""
        return self.dense_squared_norm()

    @property
    def may_cancel(self) -> bool:
        """Whether the squared norms are sums with signs, which can lose all digits."""
        return False

    def unguarded_squared_norm(self) -> Unguarded:
        """The squared norms before any check for cancelled digits, and the sizes of the summands."""
        return self.squared_norm(), None

    def dense_squared_norm(self) -> Tensor:
        """:meth:`squared_norm` from the gradients themselves: no sum with signs, and no digits that cancel."""
        return joined(squared_norm_of_rows(in_rows(part.dense())) for part in self.parts())

    def norms(self) -> Tensor | None:
        """``|G_n|``, ``[n]``, to be squared later for all parameters at once; None if this form computes the squares directly."""
        return None

    def dense_norms(self) -> Tensor:
        """:meth:`norms` from the gradients themselves."""
        return joined(torch.linalg.vector_norm(in_rows(part.dense()), dim=1) for part in self.parts())

    def sum_of_squares(self) -> Tensor:
        """``sum_n |G_n| ** 2`` entry by entry, ``[*shape]``: the diagonal of ``sum_n vec(G_n) vec(G_n)^T``.

        For complex entries it is the sum for the real and for the imaginary parts.
        """
        squares = (real_entries(part.dense()).square().sum(0) for part in self.parts())
        return total_of(value.sum(-1) if value.dim() > len(self.shape) else value for value in squares)

    @property
    def squares_form_gradients(self) -> bool:
        """Whether :meth:`sum_of_squares` forms each sample's gradient in real numbers, so that it can give the norms as well."""
        return False

    def squares_and_norms(self) -> tuple[Tensor, Tensor] | None:
        """:meth:`sum_of_squares` of the samples whose squared norms are finite, and all squared norms, ``[n]``.

        Each gradient is formed once for both. The result is None where that saves nothing.
        """
        if not self.squares_form_gradients or torch.is_grad_enabled():
            return None
        norms: list[Tensor] = []
        return total_of(self._squares_of_parts(norms)).view(self.shape), joined(norms)

    def _squares_of_parts(self, norms: list[Tensor]) -> Iterator[Tensor]:
        """The sums of squares of a few samples at a time, without those that are not finite; adds to the norms of all."""
        for part in self.parts():
            rows = in_rows(part.dense())
            norms.append(squared_norm_of_rows(rows))
            lost = ~norms[-1].isfinite()
            # On an accelerator the host would have to wait to learn whether there are any.
            yield squares_of_columns(zeroed(rows, lost) if rows.device.type != "cpu" or lost.any() else rows)

    def channel_squares(self, channels: ChannelSums) -> Tensor:
        """The sums of :meth:`sum_of_squares` over each channel, ``[channels]``."""
        return channels.of(self.sum_of_squares())

    def sample_channel_squares(self, channels: ChannelSums) -> Tensor:
        """The sums of ``|G_n| ** 2`` over each channel, ``[n, channels]``, here from the gradients themselves.

        Their sums over the channels are the squared norms, and their sums over the samples are :meth:`channel_squares`. Both
        sums have all their digits; in a single entry digits may have cancelled.
        """
        return joined(_channel_squares(part.dense(), channels) for part in self.parts())

    def shares_norms_with(self, channels: ChannelSums) -> bool:
        """Whether :meth:`sample_channel_squares` costs about as much as the squared norms and can replace them."""
        return False

    def total(self) -> Tensor:
        """``sum_n G_n``, ``[*shape]``: the gradient that autograd computes for the batch."""
        return total_of(part.dense().sum(0) for part in self.parts())

    def batch_gradient_norm(self) -> Tensor | None:
        """``||sum_n G_n||``, if the factors give it faster than a tensor of the parameter's size can be read; else None."""
        return None

    def along(self, left: Tensor, right: Tensor) -> Tensor:
        """``<left right^T, sum_n G_n>``, the total along one direction: a single number to compare with autograd's gradient.

        The shape is read as ``(left, right)``. For complex gradients it is the sum for the real and for the imaginary parts.
        """
        return left @ one_direction(self.total()).reshape(len(left), len(right)) @ right

    def parts(self) -> Iterator[PerSampleGradient]:
        """The samples in groups whose dense gradients fit into the memory budget of temporaries."""
        whole = slice(0, self.n)
        # All samples at once are this form itself, which may know its gradients already.
        return (cast("PerSampleGradient", self) if rows == whole else self.select(rows) for rows in self._chunks())

    def _chunks(self) -> Iterator[slice]:
        return chunks(self.n, math.prod(self.shape) * self.dtype.itemsize, profile_of(self.like.device).chunk_bytes)


def _channel_squares(value: Tensor, channels: ChannelSums) -> Tensor:
    """The sums of squares over each channel, ``[n, channels]``, of real gradients ``[n, *shape]``."""
    if channels.axis or value.dim() < 3:
        return channels.of_samples(value.square())
    return squared_norm_of_rows(value.flatten(2))
