"""Stacks of matrices, one of which multiplies each position, such as experts behind a router."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from torch_secorder.batch_axis.placement import Grouping, Layout, Placement
from torch_secorder.per_sample._base import PerSampleGradient
from torch_secorder.per_sample.arithmetic import zeroed
from torch_secorder.per_sample.budget import chunks
from torch_secorder.per_sample.dense_answers import Index
from torch_secorder.per_sample.outer import Outer
from torch_secorder.per_sample.profiles import profile_of


class Routed(PerSampleGradient):
    r"""``G[n, e, o, i] = sum_t g[t, o] a[t, i]`` over the positions t of sample n that matrix e got.

    The positions of each pair of sample and matrix are put together, so that all pairs are one :class:`Outer`. In it, each pair
    has as many positions as the largest pair; missing positions are zeros. Pairs without a position take no memory.

    Args:
        a: the inputs of all positions, ``[t, i]``.
        g: the gradients of their outputs, ``[t, o]``.
        matrix: the matrix that each position is multiplied by, ``[t]``.
        sample: the sample that each position belongs to, ``[t]``.
        n: the number of samples.
        shape: ``(matrices, o, i)``.
    """

    sparse = True

    def __init__(self, a: Tensor, g: Tensor, matrix: Tensor, sample: Tensor, n: int, shape: Sequence[int]):
        self.matrix, self.sample = matrix, sample
        self.n, self.shape = n, tuple(shape)
        positions = Outer(a[:, None, None], g[:, None, None], self.shape[1:])
        self.a, self.g = positions.a[:, 0, 0], positions.g[:, 0, 0]  # in at least float32

    @property
    def algorithm(self) -> str:  # type: ignore[override]  # a property where the base has a plain string
        return "routed"

    @property
    def like(self) -> Tensor:
        return self.g

    def _pairs(self) -> tuple[Tensor, Outer]:
        """The pairs that have a position, each as ``sample * matrices + matrix``, and the gradients of each."""
        pair = self.sample * self.shape[0] + self.matrix
        pairs, row = pair.unique(return_inverse=True)
        groups = Grouping(len(pairs), Layout.INDEXED, row)
        each = Outer(self.a[:, None, None], self.g[:, None, None], self.shape[1:])
        return pairs, each.grouped_by_sample(groups) if len(pairs) else each

    def _chunks_of_pairs(self) -> Iterator[tuple[Tensor, Outer]]:
        """The pairs, as many at a time as the memory limit allows for their gradients."""
        pairs, each = self._pairs()
        size, usual = self.shape[1] * self.shape[2] * self.dtype.itemsize, profile_of(self.g.device).chunk_bytes
        return ((pairs[rows], each.select(rows)) for rows in chunks(len(pairs), size, usual))

    def dense(self) -> Tensor:
        pairs, each = self._pairs()
        found = self.g.new_zeros(self.n * self.shape[0], *self.shape[1:])
        return found.index_add(0, pairs, each.dense()).view(self.n, *self.shape)

    def select(self, samples: Index) -> Routed:
        chosen = torch.arange(self.n, device=self.sample.device)[samples]
        place = chosen.new_full((self.n,), -1)
        place[chosen] = torch.arange(len(chosen), device=chosen.device)
        sample = place[self.sample]
        kept = sample >= 0
        return Routed(self.a[kept], self.g[kept], self.matrix[kept], sample[kept], len(chosen), self.shape)

    def without(self, lost: Tensor) -> Routed:
        rows = lost[self.sample]
        return Routed(zeroed(self.a, rows), zeroed(self.g, rows), self.matrix, self.sample, self.n, self.shape)

    def grouped_by_sample(self, groups: Grouping) -> Routed:
        placement = Placement(0, groups.layout, groups.sample_index)
        sample = placement.sample_of_index(self.n, groups.n, self.sample.device)
        assert sample is not None  # groups are of several
        return Routed(self.a, self.g, self.matrix, sample[self.sample], groups.n, self.shape)

    def squared_norm(self) -> Tensor:
        return self._added(lambda each: each.squared_norm())

    def dense_squared_norm(self) -> Tensor:
        return self._added(lambda each: each.dense_squared_norm())

    def _added(self, norms: Callable[[Outer], Tensor]) -> Tensor:
        """The sums of the pairs' norms over each sample's pairs."""
        pairs, each = self._pairs()
        return self.g.new_zeros(self.n).index_add(0, pairs // self.shape[0], norms(each))

    def sum_of_squares(self) -> Tensor:
        found = self.g.new_zeros(self.shape)
        for pairs, each in self._chunks_of_pairs():
            found = found.index_add(0, pairs % self.shape[0], each.dense().square())
        return found

    def total(self) -> Tensor:
        found = self.g.new_zeros(self.shape)
        for pairs, each in self._chunks_of_pairs():
            found = found.index_add(0, pairs % self.shape[0], each.dense())
        return found

    def along(self, left: Tensor, right: Tensor) -> Tensor:
        along = ((self.g @ right.view(self.shape[1:])) * self.a).sum(1)
        return along @ left[self.matrix]

    def concatenated(self, other: PerSampleGradient) -> PerSampleGradient | None:
        if not isinstance(other, Routed):
            return None
        dtype = torch.promote_types(self.dtype, other.dtype)
        a, g = (torch.cat([x.to(dtype), y.to(dtype)]) for x, y in ((self.a, other.a), (self.g, other.g)))
        matrix, sample = torch.cat([self.matrix, other.matrix]), torch.cat([self.sample, other.sample])
        return Routed(a, g, matrix, sample, self.n, self.shape)
