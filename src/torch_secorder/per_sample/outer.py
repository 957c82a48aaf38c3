"""Products over shared positions: G_n = sum_t g_{n,t} a_{n,t}^T, the gradient of every matrix that multiplies data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

from torch_secorder.autograd.precision import HALF
from torch_secorder.batch_axis.placement import Grouping
from torch_secorder.model.channels import ChannelSums
from torch_secorder.per_sample._base import Cancelling, PerSampleGradient
from torch_secorder.per_sample.arithmetic import (
    at_least_float32,
    cancellation_floor,
    joined,
    squared_norm_of_rows,
    total_of,
    zeroed,
)
from torch_secorder.per_sample.budget import chunk_bytes, chunks
from torch_secorder.per_sample.dense_answers import Index, Unguarded
from torch_secorder.per_sample.gram import SharedFactor, cheaper_algorithm, gram_columns, matrix_products, strip_width
from torch_secorder.per_sample.outer_channels import are_features, channels_at_one_position, sample_channels
from torch_secorder.per_sample.profiles import profile_of


def _adds_up_wider(x: Tensor) -> bool:
    """Whether the device multiplies factors in half precision and adds up in float32."""
    return x.dtype in HALF and x.device.type == "cuda" and not torch.is_grad_enabled()


class Outer(Cancelling):
    r"""``G[n, k, o, i] = sum_t g[n, k, t, o] a[n, k, t, i]``, viewed as the parameter's shape.

    The squared norm is taken in one of three ways, whichever is the cheapest:

    * ``product``, for one position: ``||a||^2 ||g||^2``;
    * ``gram``: ``sum_{t,s} (a_t . a_s)(g_t . g_s)``, recomputed where it cancels. The matrix of the products is symmetric, so
      that strips of columns of its lower half suffice: ``s T^2 (I + O + m)`` operations, s = 1 for one strip and 0.7 for more;
    * ``direct``: the ``O x I`` product is formed for a few samples at a time, ``(T + m) I O`` operations.

    Here m is the price of a write, in multiplications, which depends on the device
    (:class:`~torch_secorder.per_sample.profiles.DeviceProfile`); s was measured on one core in single precision. On an
    accelerator there is one strip, if memory suffices.

    Args:
        a: layer inputs, ``[n, k, t, i]``, or a :class:`SharedFactor` of them.
        g: output gradients, ``[n, k, t, o]``, or a :class:`SharedFactor` of them.
        shape: the parameter's shape, a view of ``(k * o, i)``.
    """

    def __init__(self, a: Tensor | SharedFactor, g: Tensor | SharedFactor, shape: Sequence[int]):
        inputs = a.value if isinstance(a, SharedFactor) else a
        grads = g.value if isinstance(g, SharedFactor) else g
        # Under autocast the layer casts its input to the dtype of its output, and the weight's gradient is for the cast input.
        self._common = [] if a is inputs and g is grads else [x for x in (a, g) if isinstance(x, SharedFactor)]
        inputs = inputs.to(grads.dtype)
        if grads.dtype in HALF and not _adds_up_wider(grads):
            inputs, grads = at_least_float32(inputs), at_least_float32(grads)
        self._factor_a, self._factor_g = inputs, grads
        if grads.dtype not in HALF:  # In most steps neither factor has to be converted.
            self.a, self.g = inputs, grads
        self.n, self.shape = inputs.shape[0], tuple(shape)
        positions = inputs.shape[2]
        self.algorithm = (
            "product"
            if positions == 1
            else cheaper_algorithm(positions, inputs.shape[3], grads.shape[3], profile_of(grads.device))
        )

    @property
    def _factors(self) -> tuple[Tensor, Tensor]:
        """Both factors as they were given, in half precision where the device adds up wider."""
        return self._factor_a, self._factor_g

    @cached_property
    def a(self) -> Tensor:
        """The layer's inputs, in at least float32."""
        return at_least_float32(self._factor_a)

    @cached_property
    def g(self) -> Tensor:
        """The output gradients, in at least float32."""
        return at_least_float32(self._factor_g)

    @property
    def like(self) -> Tensor:
        return self._sum_like if self._factor_g.dtype in HALF else self._factor_g

    @cached_property
    def _sum_like(self) -> Tensor:
        return self._factor_g.new_empty((), dtype=torch.float32)

    def dense(self) -> Tensor:
        a, g = (x.flatten(0, 1) for x in self._factors)
        return matrix_products(g.mT, a).reshape(self.n, *self.shape)

    def select(self, samples: Index) -> Outer:
        a, g = self._factors
        return Outer(a[samples], g[samples], self.shape)

    def without(self, lost: Tensor) -> Outer:
        a, g = (zeroed(x, lost) for x in self._factors)
        return Outer(a, g, self.shape)

    def grouped_by_sample(self, groups: Grouping) -> Outer:
        a, g = (groups.rows(x).transpose(1, 2).flatten(2, 3) for x in self._factors)
        return Outer(a, g, self.shape)

    @property
    def may_cancel(self) -> bool:
        return self.algorithm == "gram"

    def norms(self) -> Tensor | None:
        if self.algorithm == "direct" and chunk_bytes(None) is None:
            return self.dense_norms()
        if self.algorithm != "product" or self.a.shape[1] > 1:
            return None
        a, g = (torch.linalg.vector_norm(x.flatten(1), dim=1) for x in (self.a, self.g))
        return a * g

    def squared_norm(self) -> Tensor:
        return self._product() if self.algorithm == "product" else super().squared_norm()

    def _product(self) -> Tensor:
        products = squared_norm_of_rows(self.a) * squared_norm_of_rows(self.g)
        return products.sum((1, 2)) if products.shape[1] > 1 else products.flatten()

    def unguarded_squared_norm(self) -> Unguarded:
        match self.algorithm:
            case "product":
                return self._product(), None
            case "gram":
                return self._gram()
            case _:
                return self.dense_squared_norm(), None

    def squares_of_summands(self) -> Tensor | None:
        if self.algorithm != "direct":  # The other ways know it anyway.
            return None
        # A norm writes nothing beside its result.
        a, g = (torch.linalg.vector_norm(x.detach(), dim=-1).square().flatten(1) for x in (self.a, self.g))
        return torch.linalg.vecdot(a, g)

    def _gram(self) -> tuple[Tensor, Tensor]:
        k, t = self._factor_a.shape[1:3]
        line, profile = 2 * k * t * self.dtype.itemsize, profile_of(self._factor_g.device)
        size = max(1, min(strip_width(t, profile), (chunk_bytes(profile.chunk_bytes) or 0) // line))
        sums = self._whole_gram_sums if size == t and not profile.has_caches else partial(self._gram_sums, size)
        norms, diagonals = (
            joined(parts) for parts in zip(*map(sums, chunks(self.n, line * size, profile.chunk_bytes)), strict=True)
        )
        if k > 1:
            norms, diagonals = (value.view(self.n, k).sum(1) for value in (norms, diagonals))
        return norms, diagonals

    def _whole_gram_sums(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The same as :meth:`_gram_sums`, in as few calls as possible."""
        a, g = (gram for gram, _ in self._grams(rows, 0, self._factor_a.shape[2]))
        norms = torch.bmm(a.flatten(1)[:, None], g.flatten(1)[:, :, None]).flatten()
        return norms, torch.linalg.vecdot(a.diagonal(dim1=1, dim2=2), g.diagonal(dim1=1, dim2=2))

    def _gram_sums(self, size: int, rows: slice) -> tuple[Tensor, Tensor]:
        """For some samples the sum over pairs of positions, and its part from pairs of a position with itself.

        ``size`` columns are computed at a time.
        """
        norms, diagonals = [], []
        for start in range(0, self._factor_a.shape[2], size):
            gram = self._strip(rows, start, start + size)
            norms.append(gram.sum((1, 2)))
            if gram.shape[1] > size:
                norms.append(gram[:, size:].sum((1, 2)))
                gram = gram[:, :size]
            diagonals.append(gram.diagonal(dim1=1, dim2=2).sum(1))
            del gram  # so that the next strip finds its memory free
        if len(norms) == 1:
            return norms[0], diagonals[0]
        return torch.stack(norms).sum(0), torch.stack(diagonals).sum(0)

    def _strip(self, rows: slice, start: int, stop: int) -> Tensor:
        """Columns of the lower half of the product of both Gram matrices for some samples, ``[n k, t - start, columns]``."""
        (a, a_is_kept), (g, g_is_kept) = self._grams(rows, start, stop)
        if torch.is_grad_enabled() or (a_is_kept and g_is_kept):
            return a * g
        return g.mul_(a) if a_is_kept else a.mul_(g)

    def _grams(self, rows: slice, start: int, stop: int) -> list[tuple[Tensor, bool]]:
        """Columns of both Gram matrices, and whether they are kept for other forms, so that they must not be changed."""
        found = []
        for x in self._factors:
            common = next((factor for factor in self._common if factor.value is x), None)
            found.append(
                (gram_columns(x, rows, start, stop), False) if common is None else common.gram(rows, start, stop)
            )
        return found

    def dense_squared_norm(self) -> Tensor:
        return total_of(PerSampleGradient.dense_squared_norm(strip) for strip in self.by_features())

    def by_features(self) -> Iterator[Outer]:
        """The gradients in strips of output features, as many at a time as fit into the memory limit for one sample."""
        a, every = self._factors
        k, i, o = a.shape[1], a.shape[3], every.shape[3]
        if (budget := chunk_bytes(None)) is None or k * i * o * self.dtype.itemsize <= budget:
            return iter([self])
        strips = chunks(o, k * i * self.dtype.itemsize, budget)
        return (Outer(a, g, (k * g.shape[3], i)) for g in (every[..., rows] for rows in strips))

    @property
    def squares_form_gradients(self) -> bool:
        (a, g), budget = self._factors, chunk_bytes(None)
        whole = budget is None or a.shape[1] * a.shape[3] * g.shape[3] * self.dtype.itemsize <= budget
        return a.shape[2] > 1 and whole and not g.is_complex()

    def sum_of_squares(self) -> Tensor:
        if self._factor_a.shape[2] > 1:
            k, i = self._factor_a.shape[1::2]
            found = [PerSampleGradient.sum_of_squares(strip) for strip in self.by_features()]
            return torch.cat([x.view(k, len(x) // k, i) for x in found], 1).reshape(self.shape)
        a, g = self.a.square().squeeze(2), self.g.square().squeeze(2)
        return torch.einsum("nki,nko->koi", a, g).reshape(self.shape)

    def channel_squares(self, channels: ChannelSums) -> Tensor:
        if self.shares_norms_with(channels):
            return self.sample_channel_squares(channels).sum(0)
        if self.algorithm != "product" or not are_features(self, channels):
            return super().channel_squares(channels)
        return channels_at_one_position(self, channels)

    def shares_norms_with(self, channels: ChannelSums) -> bool:
        return self.algorithm != "product" and are_features(self, channels)

    def sample_channel_squares(self, channels: ChannelSums) -> Tensor:
        return sample_channels(self, channels)

    def total(self) -> Tensor:
        a, g = (x.movedim(1, 0).flatten(1, 2) for x in (self.a, self.g))
        return (g.mT @ a).reshape(self.shape)

    def batch_gradient_norm(self) -> Tensor | None:
        n, k, t, i = self.a.shape
        o = self.g.shape[3]
        # Reading a number costs as much as some thirty multiplications of a matrix product. Small gradients are read fast.
        if (
            k * t > 1
            or i * o < 2**16
            or n**2 * (i + o) > 8 * i * o
            or self.g.device.type != "cpu"
            or torch.is_grad_enabled()
        ):
            return None
        a, g = self.a.view(n, i), self.g.view(n, o)
        products = (a @ a.mT).mul_(g @ g.mT).double()
        total, magnitude = products.sum(), products.abs().sum()
        return total.sqrt().to(self.dtype) if total > cancellation_floor(self.g) * magnitude else None

    def along(self, left: Tensor, right: Tensor) -> Tensor:
        k, i, o = self.a.shape[1], self.a.shape[3], self.g.shape[3]
        if len(left) != k * o or len(right) != i:
            return super().along(left, right)
        # Without groups this is one product with a vector, instead of one for each sample.
        g = self.g @ left if k == 1 else (self.g @ left.view(k, o, 1)).squeeze(3)
        return ((self.a @ right) * g).sum()

    def concatenated(self, other: PerSampleGradient) -> PerSampleGradient | None:
        if not isinstance(other, Outer) or self._factor_a.shape[1::2] != other._factor_a.shape[1::2]:
            return None
        dtype = torch.promote_types(self._factor_g.dtype, other._factor_g.dtype)
        pairs = zip(self._factors, other._factors, strict=True)
        a, g = (torch.cat([x.to(dtype), y.to(dtype)], 2) for x, y in pairs)
        return Outer(a, g, self.shape)
