"""The confirmation: one backward pass that either contradicts what was derived from the nodes of a graph, or agrees with it.

The pass sends random numbers for some samples only, the loud ones. Where the samples were derived to be somewhere, each row of a
silent sample has to come back as exactly zero, and each row of a loud one as something. Labels never say too much, so that this
is a second opinion, which takes one pass where a search without a first opinion takes two or more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_secorder.autograd.double_precision import together_on_host
from torch_secorder.batch_axis.evidence import SPEAKS, Evidence, Unplaced, candidates
from torch_secorder.batch_axis.placement import Placement


@dataclass(frozen=True)
class RowPeaks:
    """The largest magnitude in each row of a gradient.

    Attributes:
        axes: for each axis that may count the samples, the largest magnitude at each of its indices.
        tiny: the smallest normal number of the gradient's dtype. What is no larger shows nothing.
    """

    axes: dict[int, Tensor]
    tiny: float

    def agree(self, derived: Evidence, shape: Sequence[int], n: int, loud: Tensor) -> bool:
        """Whether these are what they have to be where samples were derived to be, if only some are loud."""
        largest = max((float(rows.max()) for rows in self.axes.values() if rows.numel()), default=0.0)
        if not largest < torch.inf:
            return False
        if derived is Unplaced.NO_GRADIENT:
            return largest == 0
        if largest <= self.tiny:
            return False
        if isinstance(derived, Placement):
            heard = self._heard(derived, n, loud)
            rows = self.axes[derived.axis]
            return bool(((rows == 0) | heard).all()) and bool(((rows > SPEAKS * largest) | ~heard).all())
        if derived is not Unplaced.SHARED_BY_SAMPLES or not bool((self.axes[0] > SPEAKS * largest).all()):
            return False
        return not any(
            bool(((self.axes[one.axis] == 0) | self._heard(one, n, loud)).all()) for one in candidates(shape, n)
        )

    def _heard(self, placement: Placement, n: int, loud: Tensor) -> Tensor:
        """For each row along a placement's axis whether its sample is loud."""
        own = placement.sample_of_index(len(self.axes[placement.axis]), n, torch.device("cpu"))
        return loud.bool() if own is None else loud.bool()[own]


class PassPeaks:
    """The peaks of all gradients that one pass looks at.

    Those of one device and dtype lie in one tensor. A small tensor for each gradient would stay where the large gradients before
    and after it are freed, and the heap could not put their two places together for the next ones.

    Args:
        shapes: the shape in which each gradient is looked at.
        derived: where each was derived to have its samples. Where that is on an axis, only this axis is looked at; else each that
            may have them.
        n: how many samples.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], derived: Sequence[Evidence], n: int):
        self._ranges: list[dict[int, tuple[int, int]]] = []  # for each gradient and axis, where its peaks lie
        self._size = 0
        for shape, one in zip(shapes, derived, strict=True):
            self._ranges.append({axis: self._taken(tuple(shape) or (1,), axis) for axis in _axes(shape, one, n)})
        self._holders: list[_Holder | None] = [None] * len(self._ranges)
        self._known: dict[tuple[torch.device, torch.dtype], _Holder] = {}

    def _taken(self, shape: Sequence[int], axis: int) -> tuple[int, int]:
        start, self._size = self._size, self._size + shape[axis]
        return start, self._size

    def note(self, place: int, grad: Tensor) -> None:
        """Take the peaks of a gradient that has arrived, in place of those of an earlier one."""
        value = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
        value = value if grad.dim() else value[None]
        key = (value.device, value.dtype)
        if (holder := self._known.get(key)) is None:
            holder = self._known[key] = _Holder(*value.new_zeros(2, self._size).unbind())
        self._holders[place] = holder
        if value.numel():
            for axis, (start, end) in self._ranges[place].items():
                holder.write(value, axis, start, end)

    def on_the_host(self) -> list[RowPeaks | None]:
        """The peaks of each gradient on the host, None where none arrived; the host waits for each device once."""
        holders = list(self._known.values())
        values = dict(zip(holders, together_on_host([holder.peaks() for holder in holders]), strict=True))
        return [
            None
            if holder is None
            else RowPeaks({axis: values[holder][start:end] for axis, (start, end) in ranges.items()}, holder.tiny)
            for holder, ranges in zip(self._holders, self._ranges, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class _Holder:
    """The largest and the smallest entries of rows on one device."""

    most: Tensor
    least: Tensor

    @property
    def tiny(self) -> float:
        return torch.finfo(self.most.dtype).tiny

    def write(self, value: Tensor, axis: int, start: int, end: int) -> None:
        others = [other for other in range(value.dim()) if other != axis]
        self.most[start:end] = value.amax(others) if others else value
        self.least[start:end] = value.amin(others) if others else value

    def peaks(self) -> Tensor:
        return torch.maximum(self.most, -self.least)


def _axes(shape: Sequence[int], derived: Evidence, n: int) -> list[int]:
    """The axis on which samples were derived to be, or each that may have them, if they are on none."""
    if isinstance(derived, Placement):
        return [derived.axis]
    return [0, *[axis for axis, size in enumerate(shape) if axis and size % n == 0]]
