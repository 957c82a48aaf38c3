"""Gradients that touch only a few rows of a table, such as those of embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torch_secorder.batch_axis.placement import Grouping
from torch_secorder.model.channels import ChannelSums
from torch_secorder.per_sample._base import PerSampleGradient
from torch_secorder.per_sample.arithmetic import at_least_float32, joined, squared_norm_of_rows, zeroed
from torch_secorder.per_sample.budget import chunks
from torch_secorder.per_sample.dense_answers import Index
from torch_secorder.per_sample.outer import Outer


class RowSparse(PerSampleGradient):
    """Row ``r`` of ``G_n`` is the sum of ``g[n, t]`` over the positions t whose id is r.

    Nothing of the table's size is formed. The gradients of each pair of sample and id are added up first, and squared then.

    Args:
        ids: ``[n, t]``, the row that each position read.
        g: ``[n, t, d]``, the gradient of the row as it was read there.
        shape: ``(number of rows, d)``.
    """

    algorithm = "rows"
    sparse = True

    def __init__(self, ids: Tensor, g: Tensor, shape: Sequence[int]):
        self.ids, self.g = ids.long(), at_least_float32(g)
        self.n, self.shape = ids.shape[0], tuple(shape)

    @property
    def like(self) -> Tensor:
        return self.g

    def summed(self) -> tuple[Tensor, Tensor]:
        """Ids ``[n, t]``, sorted for each sample, and for the first of equal ids their summed gradient ``[n, t, d]``.

        The entries for the others are zero. So the host need not know how many ids differ, for which it would have to wait.
        """
        n, t = self.ids.shape
        own = self.ids.contiguous()
        ids = own.sort(1).values
        places = torch.searchsorted(ids, own) + torch.arange(0, n * t, max(t, 1), device=ids.device)[:n, None]
        summed = self.g.new_zeros(n * t, self.shape[1]).index_add(0, places.flatten(), self.g.flatten(0, 1))
        return ids, summed.view(n, t, -1)

    def dense(self) -> Tensor:
        samples = torch.arange(self.n, device=self.ids.device)[:, None]
        rows = (samples * self.shape[0] + self.ids).flatten()
        table = self.g.new_zeros(self.n * self.shape[0], self.shape[1])
        return table.index_add(0, rows, self.g.flatten(0, 1)).view(self.n, *self.shape)

    def select(self, samples: Index) -> RowSparse:
        return RowSparse(self.ids[samples], self.g[samples], self.shape)

    def without(self, lost: Tensor) -> RowSparse:
        return RowSparse(self.ids, zeroed(self.g, lost), self.shape)

    def grouped_by_sample(self, groups: Grouping) -> RowSparse:
        # A padded position has a zero gradient, so that it may have any id.
        ids, g = (groups.rows(x).flatten(1, 2) for x in (self.ids, self.g))
        return RowSparse(ids, g, self.shape)

    def norms(self) -> Tensor:
        return joined(torch.linalg.vector_norm(sums, dim=1) for sums in self._sums())

    def squared_norm(self) -> Tensor:
        return joined(squared_norm_of_rows(sums) for sums in self._sums())

    def _sums(self) -> Iterator[Tensor]:
        """The summed gradients of each sample's ids, ``[samples, numbers]``, for a few samples at a time.

        Of a table with no more rows than there are positions, such as that of the kinds of segments, or of the positions, each
        row has its sum, for which no ids are sorted.
        """
        is_short = self.shape[0] <= self.ids.shape[1]
        parts = (self.select(rows) for rows in self._chunks())
        return ((part.dense() if is_short else part.summed()[1]).flatten(1) for part in parts)

    def _chunks(self) -> Iterator[slice]:
        # For each position: four integers to sort the ids, the sum of its gradients, and the copy that is added up.
        return chunks(self.n, self.ids.shape[1] * (4 * 8 + 2 * self.g.shape[2] * self.dtype.itemsize), None)

    def sum_of_squares(self) -> Tensor:
        ids, summed = self.summed()
        return self.g.new_zeros(self.shape).index_add(0, ids.flatten(), summed.square().flatten(0, 1))

    def channel_squares(self, channels: ChannelSums) -> Tensor:
        if channels.groups > 1:
            return super().channel_squares(channels)
        ids, summed = self.summed()
        if channels.axis:
            return summed.square().sum((0, 1))
        return self.g.new_zeros(self.shape[0]).index_add(0, ids.flatten(), squared_norm_of_rows(summed).flatten())

    def total(self) -> Tensor:
        return self.g.new_zeros(self.shape).index_add(0, self.ids.flatten(), self.g.flatten(0, 1))

    def along(self, left: Tensor, right: Tensor) -> Tensor:
        return (left[self.ids] * (self.g @ right)).sum()

    def factored_inner(self, other: PerSampleGradient) -> Tensor | None:
        """With a product over positions s, ``sum_{t,s} (a_s . g_t) h_s[id_t]``, where h is the product's output gradient."""
        if not isinstance(other, Outer) or other.shape != (other.g.shape[3], other.a.shape[3]):
            return None
        size = 3 * self.ids.shape[1] * other.a.shape[2] * self.dtype.itemsize
        pairs = ((self.select(rows), other.select(rows)) for rows in chunks(self.n, size, None))
        return torch.cat([mine._inner_of(theirs.a[:, 0], theirs.g[:, 0]) for mine, theirs in pairs])

    def squares_of_summands(self) -> Tensor:
        return squared_norm_of_rows(self.g.flatten(1))

    def _inner_of(self, a: Tensor, h: Tensor) -> Tensor:
        read = h.gather(2, self.ids[:, None].expand(-1, h.shape[1], -1))
        return ((a @ self.g.mT) * read).sum((1, 2))

    def concatenated(self, other: PerSampleGradient) -> PerSampleGradient | None:
        if not isinstance(other, RowSparse):
            return None
        dtype = torch.promote_types(self.dtype, other.dtype)
        ids = torch.cat([self.ids, other.ids], 1)
        return RowSparse(ids, torch.cat([self.g.to(dtype), other.g.to(dtype)], 1), self.shape)
