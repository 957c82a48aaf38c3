"""The weight gradient of a convolution, one for each sample."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_secorder.per_sample._base import Index, PerSampleGradient, widened
from torch_secorder.per_sample.outer import Outer


class Convolution(PerSampleGradient):
    """``G_n`` = gradient of the weight of ``convolution(x_n)`` for the output gradient ``g_n``, in 1, 2 or 3 dimensions.

    A transposed convolution is the adjoint of a convolution, so its weight gradient is this one with input and output
    gradient exchanged.

    Args:
        x: inputs ``[n, channels in, *map]``; any padding other than symmetric zeros is already in them.
        g: output gradients ``[n, channels out, *map out]``.
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
    def dtype(self) -> torch.dtype:
        return self.g.dtype

    @property
    def algorithm(self) -> str:  # type: ignore[override]  # a property where the base has a plain string
        positions = math.prod(self.g.shape[2:])
        features, channels = math.prod(self.shape[1:]), self.shape[0] // self.groups
        return "gram" if positions * (features + channels) < features * channels else "direct"

    def dense(self) -> Tensor:
        """One grouped convolution with the samples as groups."""
        x, g = self.x.flatten(0, 1)[None], self.g.flatten(0, 1)[None]
        return self._weight_gradient(x, g, self.n).reshape(self.n, *self.shape)

    def total(self) -> Tensor:
        return self._weight_gradient(self.x, self.g, 1)

    def _weight_gradient(self, x: Tensor, g: Tensor, copies: int) -> Tensor:
        # Only the weight's shape matters here; expanding a scalar gives it one without memory.
        weight = x.new_zeros(()).expand(copies * self.shape[0], *self.shape[1:])
        dims = len(self.stride)
        return torch.ops.aten.convolution_backward(
            *(g, x, weight, None, self.stride, self.padding, self.dilation),
            *(False, [0] * dims, copies * self.groups, [False, True, False]),
        )[1]

    def select(self, samples: Index) -> Convolution:
        x, g = self.x[samples], self.g[samples]
        return Convolution(x, g, self.shape, self.stride, self.padding, self.dilation, self.groups)

    def squared_norm(self) -> Tensor:
        return self.patches().squared_norm() if self.algorithm == "gram" else super().squared_norm()

    def patches(self) -> Outer:
        """The same gradients as products over positions, with a the patches that the kernel saw."""
        dims = len(self.stride)
        windows = torch.nn.functional.pad(self.x, [side for p in reversed(self.padding) for side in (p, p)])
        for axis, (kernel, step, gap) in enumerate(zip(self.shape[2:], self.stride, self.dilation, strict=True)):
            windows = windows.unfold(axis + 2, gap * (kernel - 1) + 1, step)[..., ::gap]
            windows = windows.narrow(axis + 2, 0, self.g.shape[axis + 2])
        # [n, channels, *map, *kernel] -> [n, k, t, i]
        windows = windows.unflatten(1, (self.groups, -1)).movedim(2, dims + 2)
        a = windows.reshape(self.n, self.groups, math.prod(self.g.shape[2:]), -1)
        g = self.g.flatten(2).unflatten(1, (self.groups, -1)).mT
        return Outer(a, g, self.shape)
