"""Where a tensor has its samples: the batch axis, and the sample that each of its indices belongs to.

Shapes can lie: a batch as large as a sequence is long, windows or heads folded into the batch, positions without a batch
axis at all. The evidence that can't is the gradient itself. Send a random seed r back from the model's outputs, and then the
same seed with sample n's part multiplied by w_n, a power of two of its own: what belongs to sample n comes back multiplied by
w_n, exactly, since powers of two multiply without rounding. What belongs to several samples does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class Layout(Enum):
    """How samples lie along the axis that counts them."""

    ONE_EACH = "index n is sample n"
    BLOCKS = "each sample has a run of neighbouring indices"
    INTERLEAVED = "the samples alternate"
    INDEXED = "only a list tells, as behind a router"


@dataclass(frozen=True)
class Grouping:
    """How several rows fall to each of n samples: the runs, turns or list of :class:`Placement`."""

    n: int
    layout: Layout
    sample_index: Tensor | None = None

    def rows(self, value: Tensor) -> Tensor:
        """``[rows, ...]`` -> ``[n, most rows of one sample, ...]``, padded with zeros."""
        if self.sample_index is None:
            outer = self.layout is Layout.BLOCKS
            return value.unflatten(0, (self.n, -1)) if outer else value.unflatten(0, (-1, self.n)).transpose(0, 1)
        owner = self.sample_index
        counts = torch.bincount(owner, minlength=self.n)
        order = owner.argsort(stable=True)
        most = int(counts.max())
        if bool((counts == most).all()):
            return value[order].unflatten(0, (self.n, most))
        place = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner[order]]
        return value.new_zeros(self.n, most, *value.shape[1:]).index_put((owner[order], place), value[order])

    def sums(self, value: Tensor) -> Tensor:
        """``[rows, ...]`` -> ``[n, ...]``, the sums over each sample's rows."""
        if self.sample_index is None:
            return self.rows(value).sum(1)
        return value.new_zeros(self.n, *value.shape[1:]).index_add(0, self.sample_index, value)


@dataclass(frozen=True)
class Placement:
    """Which axis counts samples, and how.

    Attributes:
        axis: the axis.
        fold: "none" if index n is sample n; "outer" if each sample has a run of neighbouring indices; "inner" if the
            samples alternate; "listed" if only a list tells, as behind a router.
        listed: for "listed", the sample of each index.
    """

    axis: int = 0
    layout: Layout = Layout.ONE_EACH
    sample_index: Tensor | None = None

    def fits(self, shape: Sequence[int], n: int) -> bool:
        """Whether a tensor of this shape can be placed so."""
        size = shape[self.axis] if len(shape) > self.axis else 0
        if self.sample_index is not None:
            return size == len(self.sample_index)
        return size == n if self.layout is Layout.ONE_EACH else size > 0 and size % n == 0

    @property
    def is_first_axis(self) -> bool:
        """Whether index n of the first axis is sample n."""
        return self.axis == 0 and self.layout is Layout.ONE_EACH

    @property
    def is_one_sample(self) -> bool:
        """Whether all of the tensor belongs to one sample: a module that was called for each sample in turn."""
        return self.sample_index is not None and bool((self.sample_index == self.sample_index[0]).all())

    def grouping(self, size: int, n: int, device: torch.device) -> Grouping | None:
        """How ``size`` indices fall to n samples; None if index n is sample n."""
        return (
            None
            if self.layout is Layout.ONE_EACH
            else Grouping(
                n, self.layout, self.sample_index if self.sample_index is None else self.sample_index.to(device)
            )
        )

    def sample_of_index(self, size: int, n: int, device: torch.device) -> Tensor | None:
        """The sample of each index, ``[size]``; None if index n is sample n."""
        if self.sample_index is not None:
            return self.sample_index.to(device)
        if self.layout is Layout.ONE_EACH:
            return None
        samples = torch.arange(n, device=device)
        return samples.repeat_interleave(size // n) if self.layout is Layout.BLOCKS else samples.repeat(size // n)


FIRST = Placement()  # index n of the first axis is sample n
