"""The diagonal's summand of one backward pass, kept factored until the pass is accepted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_secorder.model.channels import ChannelSums
from torch_secorder.per_sample._base import PerSampleGradient
from torch_secorder.per_sample.outer import Outer


@dataclass(frozen=True, eq=False)
class SquareSum:
    """``factor * sum_n G_n ** 2`` entry by entry, or added up over each channel.

    For one position it is the product of the squared factors. That product is added directly to the total: both are as large as
    the parameter, and each further pass through memory would cost as much again.

    Attributes:
        values: the sum without the factor, ``[*shape]``, or the two matrices ``(g^T ** 2, a ** 2)`` whose product it is.
        shape: the parameter's shape, or ``(channels,)``.
        factor: the factor of the sum.
    """

    values: Tensor | tuple[Tensor, Tensor]
    shape: tuple[int, ...]
    factor: float = 1.0

    @property
    def device(self) -> torch.device:
        """Where the sum is."""
        return (self.values if isinstance(self.values, Tensor) else self.values[0]).device

    @classmethod
    def of(cls, form: PerSampleGradient, channels: ChannelSums | None = None) -> SquareSum:
        """The sum over the samples of a form, entry by entry unless there are ``channels`` to add up over."""
        if channels is not None:
            return cls(form.channel_squares(channels).detach(), (channels.length(form.shape),))
        if isinstance(form, Outer) and form.a.shape[1:3] == (1, 1):
            g, a = form.g.detach(), form.a.detach()
            return cls((g.square().flatten(1).T, a.square().flatten(1)), form.shape)
        return cls(form.sum_of_squares().detach(), form.shape)

    @classmethod
    def summed(cls, several: Sequence[SquareSum]) -> SquareSum:
        """The sum of several, written into the memory of the first one if that is a tensor."""
        first, *others = several
        total = first.values if isinstance(first.values, Tensor) and first.factor == 1 else first.added(None)
        for one in others:
            total = one.added(total)
        return cls(total, first.shape)

    def times(self, factor: float) -> SquareSum:
        """The same sum with another factor on it."""
        return SquareSum(self.values, self.shape, factor * self.factor)

    def added(self, total: Tensor | None) -> Tensor:
        """The total after adding the sum to it in place; a new tensor if there is no total yet."""
        if isinstance(self.values, Tensor):
            return self.values * self.factor if total is None else total.add_(self.values.to(total), alpha=self.factor)
        left, right = self.values
        if total is None:
            return torch.addmm(left.new_zeros(()), left, right, beta=0, alpha=self.factor).reshape(self.shape)
        left, right = left.to(total), right.to(total)
        return total.view(len(left), -1).addmm_(left, right, alpha=self.factor).view(self.shape)
