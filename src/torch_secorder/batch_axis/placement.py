"""What is said of a tensor's samples: which axis counts them, and the sample that each of its indices belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property, partial

import torch
from torch import Tensor


class Layout(Enum):
    """How samples lie along the axis that counts them."""

    ONE_EACH = "index n is sample n"
    BLOCKS = "each sample has a run of neighboring indices"
    INTERLEAVED = "the samples alternate"
    INDEXED = "only a list tells, as behind a router"


@dataclass(frozen=True)
class Grouping:
    """Which rows of a tensor belong to each of n samples, where a sample has several.

    Attributes:
        n: how many samples.
        layout: how the rows of the samples lie: in blocks, interleaved or by a list.
        sample_index: for the list, the sample of each row.
        on_host: the same list on the host, if it was made there, so that nobody waits to read it.
    """

    n: int
    layout: Layout
    sample_index: Tensor | None = None
    on_host: Tensor | None = None

    def rows(self, value: Tensor) -> Tensor:
        """``[rows, ...]`` -> ``[n, most rows of one sample, ...]``, padded with zeros."""
        if self.sample_index is None:
            blocks = self.layout is Layout.BLOCKS
            return value.unflatten(0, (self.n, -1)) if blocks else value.unflatten(0, (-1, self.n)).transpose(0, 1)
        order, most, places = self._listed
        if places is None:
            return value[order].unflatten(0, (self.n, most))
        return value.new_zeros(self.n, most, *value.shape[1:]).index_put(places, value[order])

    @cached_property
    def _listed(self) -> tuple[Tensor, int, tuple[Tensor, Tensor] | None]:
        """The rows sample by sample, and how many the largest sample has.

        Where samples have different numbers of rows, each row's sample and its place among that sample's rows come with them.
        A list on another device than the host makes it wait for this, which is kept with a list that is remembered.
        """
        assert self.sample_index is not None
        index = self.sample_index if self.on_host is None else self.on_host
        counts = torch.bincount(index, minlength=self.n)
        order = index.argsort(stable=True)
        fewest, most = torch.stack(counts.aminmax()).tolist()
        moved = partial(torch.Tensor.to, device=self.sample_index.device, non_blocking=True)
        if fewest == most:
            return moved(order), most, None
        sample = index[order]
        place = torch.arange(len(sample), device=sample.device) - (counts.cumsum(0) - counts)[sample]
        return moved(order), most, (moved(sample), moved(place))

    def sums(self, value: Tensor) -> Tensor:
        """``[rows, ...]`` -> ``[n, ...]``, the sums over each sample's rows."""
        if self.sample_index is None:
            return self.rows(value).sum(1)
        return value.new_zeros(self.n, *value.shape[1:]).index_add(0, self.sample_index, value)


@dataclass(frozen=True)
class Placement:
    """Which axis of a tensor counts samples, and how.

    Attributes:
        axis: that axis.
        layout: how the samples lie along it.
        sample_index: for a list, the sample of each index.
    """

    axis: int = 0
    layout: Layout = Layout.ONE_EACH
    sample_index: Tensor | None = None
    _groupings: dict[tuple[int, torch.device], Grouping] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def fits(self, shape: Sequence[int], n: int) -> bool:
        """Whether a tensor of this shape may have its n samples placed in this way."""
        size = shape[self.axis] if len(shape) > self.axis else 0
        if self.sample_index is not None:
            return size == len(self.sample_index)
        return size == n if self.layout is Layout.ONE_EACH else size > 0 and size % n == 0

    def agrees(self, other: Placement, shape: Sequence[int], n: int) -> bool:
        """Whether both say the same of a tensor of this shape."""
        if self.axis != other.axis:
            return False
        if self.sample_index is None and other.sample_index is None and self.layout is other.layout:
            return True
        host = torch.device("cpu")
        lists = [one.sample_of_index(shape[one.axis], n, host) for one in (self, other)]
        own, others = (torch.arange(n, device=host) if found is None else found for found in lists)
        return torch.equal(own, others)

    def only_sample(self, grad: Tensor, n: int) -> Tensor | None:
        """The sample that all of a gradient belongs to, ``[1]``, as where a module is called for each sample in turn.

        Indices without a gradient may be any sample's. The result is None if several samples have one.
        """
        size = grad.shape[self.axis]
        samples = self.sample_of_index(size, n, grad.device)
        samples = torch.arange(size, device=grad.device) if samples is None else samples
        found = samples[grad.movedim(self.axis, 0).reshape(size, -1).ne(0).any(1)].unique()
        return None if len(found) > 1 else found if len(found) else samples[:1]

    def grouping(self, n: int, device: torch.device) -> Grouping | None:
        """Which indices belong to each of n samples; None if index n is sample n."""
        if self.layout is Layout.ONE_EACH:
            return None
        if (known := self._groupings.get((n, device))) is None:
            own = self.sample_index
            on_host = own if own is not None and own.device.type == "cpu" else None
            index = None if own is None else own.to(device, non_blocking=device.type != "cpu")
            known = self._groupings[n, device] = Grouping(n, self.layout, index, on_host)
        return known

    def sample_of_index(self, size: int, n: int, device: torch.device) -> Tensor | None:
        """The sample of each index, ``[size]``; None if index n is sample n."""
        if self.sample_index is not None:
            return self.sample_index.to(device, non_blocking=device.type != "cpu")
        if self.layout is Layout.ONE_EACH:
            return None
        samples = torch.arange(n, device=device)
        return samples.repeat_interleave(size // n) if self.layout is Layout.BLOCKS else samples.repeat(size // n)


FIRST = Placement()  # index n of the first axis is sample n
