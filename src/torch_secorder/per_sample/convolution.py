"""The weight gradient of a convolution, one for each sample."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_secorder.per_sample._base import Index, PerSampleGradient, grouped, widened
from torch_secorder.per_sample.outer import Outer


class Convolution(PerSampleGradient):
    """``G_n`` = gradient of the weight of ``convolution(x_n)`` for the output gradient ``g_n``, in 1, 2 or 3 dimensions.

    A transposed convolution is the adjoint of a convolution, so its weight gradient is this one with input and output
    gradient exchanged.

    Args:
        x: inputs ``[n, r, channels in, *map]``, r maps for each sample (of a module that was called r times, or of images
            folded into the batch); any padding other than symmetric zeros is already in them.
        g: output gradients ``[n, r, channels out, *map out]``.
        shape: the weight's shape ``(channels out, channels in / groups, *kernel)``.
        stride: one step for each spatial axis.
        padding: zeros on both sides of each spatial axis.
        dilation: distance of the kernel's taps on each spatial axis.
        groups: independent blocks of channels.
    """

    def __init__(
        self,
        x: Tensor,
        g: Tensor,
        shape: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ):
        self.x, self.g = widened(x.to(g.dtype)), widened(g)
        self.n, self.shape = x.shape[0], tuple(shape)
        self.stride, self.padding, self.dilation, self.groups = list(stride), list(padding), list(dilation), groups

    @property
    def like(self) -> Tensor:
        return self.g

    @property
    def algorithm(self) -> str:  # type: ignore[override]  # a property where the base has a plain string
        positions = self.g.shape[1] * math.prod(self.g.shape[3:])
        features, channels = math.prod(self.shape[1:]), self.shape[0] // self.groups
        return "gram" if positions * (features + channels) < features * channels else "direct"

    def dense(self) -> Tensor:
        """One grouped convolution with the samples as groups."""
        x, g = (value.transpose(0, 1).flatten(1, 2) for value in (self.x, self.g))
        return self._weight_gradient(x, g, self.n).reshape(self.n, *self.shape)

    def total(self) -> Tensor:
        return self._weight_gradient(self.x.flatten(0, 1), self.g.flatten(0, 1), 1)

    def projection(self, left: Tensor, right: Tensor) -> Tensor:
        """A convolution with ``right`` as its only kernel, against the channels of g summed with ``left``."""
        kernel = right.view(1, *self.shape[1:]).expand(self.groups, *self.shape[1:])
        x, g = self.x.flatten(0, 1), self.g.flatten(0, 1)
        dims = len(self.stride)
        seen = torch.ops.aten.convolution(
            *(x, kernel, None, self.stride, self.padding, self.dilation, False, [0] * dims, self.groups)
        )
        summed = (g * left.view(-1, *[1] * dims)).unflatten(1, (self.groups, -1)).sum(2)
        for axis in range(2, seen.dim()):
            seen = seen.narrow(axis, 0, summed.shape[axis])
        return (seen * summed).sum()

    def _weight_gradient(self, x: Tensor, g: Tensor, copies: int) -> Tensor:
        # Only the weight's shape matters here; expanding a scalar gives it one without memory.
        weight = x.new_zeros(()).expand(copies * self.shape[0], *self.shape[1:])
        dims = len(self.stride)
        return torch.ops.aten.convolution_backward(
            *(g, x, weight, None, self.stride, self.padding, self.dilation),
            *(False, [0] * dims, copies * self.groups, [False, True, False]),
        )[1]

    def select(self, samples: Index) -> Convolution:
        return self._like(self.x[samples], self.g[samples])

    def regrouped(self, owner: Tensor, n: int) -> Convolution:
        return self._like(*(grouped(value, owner, n).flatten(1, 2) for value in (self.x, self.g)))

    def joined(self, other: PerSampleGradient) -> PerSampleGradient | None:
        if not isinstance(other, Convolution) or self._settings() != other._settings():
            return None
        if self.x.shape[2:] != other.x.shape[2:]:
            return None
        dtype = torch.promote_types(self.dtype, other.dtype)
        pairs = ((self.x, other.x), (self.g, other.g))
        return self._like(*(torch.cat([mine.to(dtype), theirs.to(dtype)], 1) for mine, theirs in pairs))

    def _like(self, x: Tensor, g: Tensor) -> Convolution:
        return Convolution(x, g, *self._settings())

    def _settings(self) -> tuple[tuple[int, ...], list[int], list[int], list[int], int]:
        return self.shape, self.stride, self.padding, self.dilation, self.groups

    def squared_norm(self) -> Tensor:
        return self.patches().squared_norm() if self.algorithm == "gram" else super().squared_norm()

    def patches(self) -> Outer:
        """The same gradients as products over positions, with a the patches that the kernel saw."""
        dims = len(self.stride)
        x, g = self.x.flatten(0, 1), self.g.flatten(0, 1)
        windows = torch.nn.functional.pad(x, [side for p in reversed(self.padding) for side in (p, p)])
        for axis, (kernel, step, gap) in enumerate(zip(self.shape[2:], self.stride, self.dilation, strict=True)):
            windows = windows.unfold(axis + 2, gap * (kernel - 1) + 1, step)[..., ::gap]
            windows = windows.narrow(axis + 2, 0, g.shape[axis + 2])
        # [n r, channels, *map, *kernel] -> [n, k, r t, i]
        windows = windows.unflatten(1, (self.groups, -1)).movedim(2, dims + 2)
        a = windows.reshape(self.n, -1, self.groups, math.prod(g.shape[2:]), math.prod(self.shape[1:]))
        g = g.reshape(self.n, -1, self.groups, self.shape[0] // self.groups, a.shape[3]).mT
        return Outer(a.transpose(1, 2).flatten(2, 3), g.transpose(1, 2).flatten(2, 3), self.shape)
