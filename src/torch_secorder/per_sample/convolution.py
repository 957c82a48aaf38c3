"""The weight gradients of a convolution, one for each sample."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torch_secorder.batch_axis.placement import Grouping
from torch_secorder.model.channels import ChannelSums
from torch_secorder.per_sample._base import Cancelling, PerSampleGradient, recompute_cancelled
from torch_secorder.per_sample.arithmetic import (
    at_least_float32,
    cancellation_floor,
    joined,
    squared_norm_of_rows,
    squared_norms_along,
    total_of,
    zeroed,
)
from torch_secorder.per_sample.budget import chunk_bytes
from torch_secorder.per_sample.convolution_gram import gram_channels, gram_norms
from torch_secorder.per_sample.convolution_products import (
    one_product,
    patches,
    shifted_products,
    squares_of_products,
)
from torch_secorder.per_sample.costs import Sizes, predicted
from torch_secorder.per_sample.dense_answers import Index, Unguarded
from torch_secorder.per_sample.profiles import profile_of


class Convolution(Cancelling):
    """``G_n`` = gradient of the weight of ``convolution(x_n)`` for the output gradient ``g_n``, in 1, 2 or 3 dimensions.

    A transposed convolution is the adjoint of a convolution, so its weight gradient is this one with input and output
    gradient exchanged.

    There are T positions, P pixels, a kernel of K taps, K_0 of them along the first axis, and I and O channels per group. The
    squared norms are taken in one of four ways, whichever :mod:`~torch_secorder.per_sample.costs` predicts to be the fastest:

    * ``direct``: torch's own weight gradient, samples as groups, or one sample at a time for large kernels on images; ``T K I O``
      multiplications, fast for depthwise kernels of 3;
    * ``shifted``: as many, in K_0 matrix products of views (:func:`shifted_products`); no copies at all for a kernel of one; in a
      single product of unfolded patches where there are few channels (:func:`one_product`);
    * ``gram``: ``sum_{t,s} (sum_taps x_{t+tap} . x_{s+tap}) (g_t . g_s)`` from the pixels' Gram matrix, ``P^2 I + T^2 O``
      multiplications, recomputed where it cancels: for small maps with many channels;
    * ``patches``: products of unfolded patches and g (:class:`Outer`), for patches that don't overlap or a single one.

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
        self.x, self.g = at_least_float32(x.to(g.dtype)), at_least_float32(g)
        self.n, self.shape = x.shape[0], tuple(shape)
        self.stride, self.padding, self.dilation, self.groups = list(stride), list(padding), list(dilation), groups
        for axis, (kernel, step, sides) in enumerate(zip(self.shape[2:], stride, padding, strict=True), 3):
            if kernel == 1 and step > 1 and not sides:  # Most of the map is never read; it is left out here.
                self.x = self.x.unfold(axis, 1, step).squeeze(-1).narrow(axis, 0, g.shape[axis])
                self.stride[axis - 3] = 1

    @property
    def like(self) -> Tensor:
        return self.g

    @property
    def algorithm(self) -> str:  # type: ignore[override]  # a property where the base has a plain string
        costs = predicted(self.sizes)
        return min(costs, key=lambda form: costs[form])

    @property
    def sizes(self) -> Sizes:
        """The sizes that the costs depend on."""
        channels, features = self.shape[0] // self.groups, self.shape[1]
        maps = (tuple(self.x.shape[3:]), tuple(self.g.shape[3:]), self.shape[2:])
        rest = (tuple(self.stride), tuple(self.padding), self.dtype.itemsize)
        profile = profile_of(self.g.device)
        budget = chunk_bytes(profile.convolution_bytes) or profile.convolution_bytes
        return Sizes(self.n, self.x.shape[1], self.groups, features, channels, *maps, *rest, budget, profile)

    def dense(self) -> Tensor:
        """One grouped convolution with the samples as groups, or one convolution for each sample."""
        if self.sizes.one_by_one:
            pairs = zip(self.x.split(1), self.g.split(1), strict=True)
            return torch.stack([self._weight_gradient(x[0], g[0], 1) for x, g in pairs])
        x, g = (value.transpose(0, 1).flatten(1, 2) for value in (self.x, self.g))
        return self._weight_gradient(x, g, self.n).reshape(self.n, *self.shape)

    def total(self) -> Tensor:
        return self._weight_gradient(self.x.flatten(0, 1), self.g.flatten(0, 1), 1)

    def along(self, left: Tensor, right: Tensor) -> Tensor:
        """The convolution of x with ``right`` as its only kernel, times the sum of g's channels with weights ``left``."""
        g, channels = self.g.flatten(0, 1), self.shape[0] // self.groups
        seen = self._seen_through(right)
        for axis in range(2, seen.dim()):
            seen = seen.narrow(axis, 0, g.shape[axis])
        if channels == 1:
            return (seen * g).sum((0, *range(2, g.dim()))) @ left
        summed = left.view(self.groups, 1, channels) @ g.unflatten(1, (self.groups, channels)).flatten(3)
        return (seen.flatten(2) * summed.squeeze(2)).sum()

    def _seen_through(self, kernel: Tensor) -> Tensor:
        """The convolution of x with a kernel that is the same for all groups, ``[n, groups, ...]``."""
        x, dims = self.x.flatten(0, 1), len(self.stride)
        if self.groups == 1 and {*self.shape[2:], *self.stride} == {1} and not any(self.padding):
            # A product with a vector takes a fifth of the time.
            return (kernel @ x.flatten(2)).view(len(x), 1, *x.shape[2:])
        kernel = kernel.view(1, *self.shape[1:]).expand(self.groups, *self.shape[1:])
        return torch.ops.aten.convolution(
            *(x, kernel, None, self.stride, self.padding, self.dilation, False, [0] * dims, self.groups)
        )

    def _weight_gradient(self, x: Tensor, g: Tensor, copies: int) -> Tensor:
        # Only the weight's shape matters here. A CPU would copy an expanded scalar; elsewhere that saves as much as the result.
        shape = (copies * self.shape[0], *self.shape[1:])
        weight = x.new_empty(shape) if x.device.type == "cpu" else x.new_empty(()).expand(shape)
        dims = len(self.stride)
        # A map of one pixel may have strides in any order, which torch takes for those of channels-last maps, and then refuses.
        x = x.view(-1).view(x.shape) if x.is_contiguous() else x
        return torch.ops.aten.convolution_backward(
            *(g, x, weight, None, self.stride, self.padding, self.dilation),
            *(False, [0] * dims, copies * self.groups, [False, True, False]),
        )[1]

    def select(self, samples: Index) -> Convolution:
        return self._like(self.x[samples], self.g[samples])

    def without(self, lost: Tensor) -> Convolution:
        return self._like(zeroed(self.x, lost), zeroed(self.g, lost))

    def grouped_by_sample(self, groups: Grouping) -> Convolution:
        return self._like(*(groups.rows(value).flatten(1, 2) for value in (self.x, self.g)))

    def concatenated(self, other: PerSampleGradient) -> PerSampleGradient | None:
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

    @property
    def may_cancel(self) -> bool:
        return self.algorithm == "gram" or (self.algorithm == "patches" and self.sizes.positions > 1)

    def norms(self) -> Tensor | None:
        form = self.algorithm
        if form == "direct":
            return self.dense_norms()
        if form != "shifted" or profile_of(self.g.device).has_caches:
            return None
        rows = (one_product(part).reshape(part.n, -1) for part in self._parts("shifted"))
        return joined(torch.linalg.vector_norm(value, dim=1) for value in rows)

    def unguarded_squared_norm(self) -> Unguarded:
        return self._unguarded(self.algorithm)

    def squared_norms(self, form: str) -> Tensor:
        """The squared norms by one of the four algorithms, whatever it costs."""
        norms, sizes = self._unguarded(form)
        return norms if sizes is None else recompute_cancelled(norms, sizes, self)

    def _unguarded(self, form: str) -> Unguarded:
        match form:
            case "direct":
                return self.dense_squared_norm(), None
            case "shifted":
                return joined(part._shifted_squared_norms() for part in self._parts("shifted")), None
            case "gram":
                found: list[Unguarded] = [gram_norms(part) for part in self._parts("gram")]
            case _:
                found = [patches(part).unguarded_squared_norm() for part in self._parts("patches")]
        sizes = [size for _, size in found if size is not None]
        return joined(norms for norms, _ in found), joined(sizes) if sizes else None

    @property
    def _forms_directly(self) -> bool:
        """Whether gradients are formed as torch forms a batch's, and not by products of shifted rows."""
        return (costs := predicted(self.sizes))["direct"] <= costs.get("shifted", math.inf)

    @property
    def squares_form_gradients(self) -> bool:
        return self.sizes.positions > 1 and self._forms_directly and not self.g.is_complex()

    def squares_and_norms(self) -> tuple[Tensor, Tensor] | None:
        has_caches = profile_of(self.g.device).has_caches
        if self.sizes.positions == 1 or self._forms_directly or torch.is_grad_enabled() or not has_caches:
            return super().squares_and_norms()
        squares, norms = self._shifted_squares()
        return (squares, norms) if bool(norms.isfinite().all()) else None

    def sum_of_squares(self) -> Tensor:
        if self.sizes.positions == 1:
            return patches(self).sum_of_squares()
        return super().sum_of_squares() if self._forms_directly else self._shifted_squares()[0]

    def _shifted_squares(self) -> tuple[Tensor, Tensor]:
        """The squares added up over the samples, and over each sample's entries, from products of shifted rows."""
        squares, norms = squares_of_products(self._parts("shifted"))
        value = squares.unflatten(2, (self.shape[1], -1))  # [first axis's taps, k, i, other taps, o]
        return value.permute(1, 4, 2, 0, 3).reshape(self.shape), norms

    def channel_squares(self, channels: ChannelSums) -> Tensor:
        if self.sizes.positions == 1 or self.algorithm == "patches":
            return total_of(patches(part).channel_squares(channels) for part in self._parts("patches"))
        return self.sample_channel_squares(channels).sum(0)

    def shares_norms_with(self, channels: ChannelSums) -> bool:
        if channels.axis and channels.groups != self.groups:
            return False
        if self.algorithm == "gram":
            return channels.axis == 0 or self._has_few_positions()
        return self.sizes.positions > 1 and self.algorithm in ("direct", "shifted")

    def _has_few_positions(self) -> bool:
        """Whether sums over input channels are cheaper from the Gram matrix of the output gradients than from the gradients.

        For each of the patches' features, T^2 multiplications take the place of T O. Unfolding the patches costs time as well:
        measured on one core, it pays from about a quarter of the multiplications on.
        """
        return 4 * self.sizes.positions <= self.shape[0] // self.groups

    def sample_channel_squares(self, channels: ChannelSums) -> Tensor:
        if channels.axis and channels.groups != self.groups:  # a weight that is used with other groups than its layer's
            return super().sample_channel_squares(channels)
        # On an accelerator the host would have to wait to learn what cancels.
        if self.algorithm != "gram" or self.g.is_complex() or not profile_of(self.g.device).has_caches:
            return self._formed_channel_squares(channels)
        if channels.axis and not self._has_few_positions():
            return self._formed_channel_squares(channels)
        if channels.axis:
            return joined(patches(part).sample_channel_squares(channels) for part in self._parts("patches"))
        found = [gram_channels(part) for part in self._parts("gram")]
        sums, magnitudes = (joined(parts) for parts in zip(*found, strict=True))
        lost = [sums.sum(axis) < cancellation_floor(self.g) * magnitudes.sum(axis) for axis in (0, 1)]
        return self._formed_channel_squares(channels) if bool(torch.cat(lost).any()) else sums

    def _formed_channel_squares(self, channels: ChannelSums) -> Tensor:
        """The sums of squares from the gradients themselves."""
        if self.g.is_complex() or self._forms_directly:
            return super().sample_channel_squares(channels)
        return joined(part._shifted_channel_squares(channels) for part in self._parts("shifted"))

    def _shifted_channel_squares(self, channels: ChannelSums) -> Tensor:
        """The sums of squares from products ``[n k, i * other taps, o]``."""
        sums = total_of(squared_norms_along(value, 2 if channels.axis else 1) for value in shifted_products(self))
        return (sums.unflatten(1, (self.shape[1], -1)).sum(2) if channels.axis else sums).view(self.n, -1)

    def _parts(self, form: str) -> Iterator[Convolution]:
        step = self.sizes.step(form)
        if step == self.n:
            return iter([self])
        return (self.select(slice(start, start + step)) for start in range(0, self.n, step))

    def _chunks(self) -> Iterator[slice]:
        step = self.sizes.step("direct")
        return (slice(start, start + step) for start in range(0, self.n, step))

    def _shifted_squared_norms(self) -> Tensor:
        found = iter([one_product(self)]) if self.sizes.unfolds_all else shifted_products(self)
        # The products are read in the order in which they lie in memory.
        products = (value if value.is_contiguous() else value.mT for value in found)
        squares = [squared_norm_of_rows(value.reshape(self.n, -1)) for value in products]
        return torch.stack(squares).sum(0) if len(squares) > 1 else squares[0]
