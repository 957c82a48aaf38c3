"""The axis on which a parameter counts its channels, and sums over all other axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_ANY_CONVOLUTION: Any = nn.Conv1d.__base__


def channel_axis(module: nn.Module) -> int:
    """The axis of a module's weight that counts its output channels."""
    transposed = getattr(module, "transposed", False) is True or type(module).__name__ == "Conv1D"
    return 1 if transposed else 0


@dataclass(frozen=True)
class ChannelSums:
    """Sums over all entries of a parameter that belong to one channel.

    Attributes:
        axis: the axis of the parameter that counts the channels.
        groups: the groups of a convolution. Axis 0 of its weight counts the channels of all groups, axis 1 those of one group, so
            that a channel on axis 1 is a group and a place in it.
    """

    axis: int
    groups: int = 1

    def length(self, shape: Sequence[int]) -> int:
        """How many channels a parameter of this shape has."""
        return shape[self.axis] * (self.groups if self.axis else 1)

    def of(self, value: Tensor) -> Tensor:
        """The sums ``[channels]`` of a tensor of the parameter's shape."""
        if self.axis:
            value = value.unflatten(0, (self.groups, value.shape[0] // self.groups)).transpose(1, 2).flatten(0, 1)
        return value.flatten(1).sum(1) if value.dim() > 1 else value

    def of_samples(self, squares: Tensor) -> Tensor:
        """The sums ``[n, channels]`` of n tensors of the parameter's shape, ``[n, *shape]``."""
        if not self.axis:
            return squares.flatten(2).sum(2) if squares.dim() > 2 else squares
        inside = squares.unflatten(1, (self.groups, squares.shape[1] // self.groups))
        return inside.sum([2, *range(4, inside.dim())]).flatten(1)

    def spread(self, sums: Tensor, shape: Sequence[int]) -> Tensor:
        """A tensor of the parameter's shape in which every entry has the mean of its channel."""
        return self.broadcast(sums * (self.length(shape) / max(1, math.prod(shape))), shape)

    def broadcast(self, values: Tensor, shape: Sequence[int]) -> Tensor:
        """A tensor of the parameter's shape in which every entry has the value of its channel, ``[channels]``."""
        if not self.axis:
            return values.view(-1, *[1] * (len(shape) - 1)).expand(*shape)
        inside = values.view(self.groups, 1, shape[1], *[1] * (len(shape) - 2))
        return inside.expand(self.groups, shape[0] // self.groups, *shape[1:]).reshape(*shape)


def channel_sums(kind: str, module: nn.Module, shape: Sequence[int]) -> ChannelSums | None:
    """The sums that "rows" (a number for each output channel) or "columns" (for each input channel) stands for.

    A parameter with fewer than two axes has one number for each output channel already; it has no columns, for which the result
    is None.
    """
    if len(shape) < 2:
        return ChannelSums(0) if kind == "rows" and shape else None
    outputs = channel_axis(module)
    groups = module.groups if isinstance(module, _ANY_CONVOLUTION) else 1
    return ChannelSums(outputs if kind == "rows" else 1 - outputs, groups)
