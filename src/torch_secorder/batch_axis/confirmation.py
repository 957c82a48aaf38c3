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

    @classmethod
    def of(cls, grad: Tensor, derived: Evidence, n: int) -> RowPeaks:
        """Those along the axis on which samples were derived to be; along each that may have them, if they are on none."""
        value = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
        shape = tuple(grad.shape) or (1,)
        value = value if grad.dim() else value[None]
        if isinstance(derived, Placement):
            axes = [derived.axis]
        else:
            axes = [0, *[axis for axis, size in enumerate(shape) if axis and size % n == 0]]
        return cls({axis: _peaks(value, axis) for axis in axes}, torch.finfo(grad.dtype).tiny)

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


def _peaks(value: Tensor, axis: int) -> Tensor:
    others = [other for other in range(value.dim()) if other != axis]
    if not value.numel() or not others:
        return value.abs() if value.numel() else value.new_zeros(value.shape[axis])
    return torch.maximum(value.amax(others), -value.amin(others))


def on_the_host(peaks: Sequence[RowPeaks | None]) -> list[RowPeaks | None]:
    """The same on the host, which waits for each device once."""
    values = iter(together_on_host([rows for one in peaks if one is not None for rows in one.axes.values()]))
    return [None if one is None else RowPeaks({axis: next(values) for axis in one.axes}, one.tiny) for one in peaks]
