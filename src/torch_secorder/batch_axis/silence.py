"""The evidence of silence: entries that belong to a sample are zero in passes that send no gradient for it.

A power of two multiplies without rounding, but some devices add in another order each time, after which half precision rounds
differently: behind sixteen layers, marked gradients of a language model are off by a tenth. Zero is zero in any order. Here,
every pass sends random numbers for some samples only, the loud ones, and entries of the silent samples come back as zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations, islice

import torch
from torch import Tensor

from torch_secorder.batch_axis.placement import Layout, Placement
from torch_secorder.batch_axis.sketch import Sketch

# By how much a silent row may differ from zero: relative to the row when it is loud, and to the largest row. Zeros do not round.
FORGIVEN_IN_SILENCE = (1e-5, 1e-6)
FORGIVEN_IN_SILENCE_OF_DOUBLES = (1e-9, 1e-14)


def loud_samples(n: int) -> list[Tensor]:
    """For each pass, ``[n]`` with ones for the loud samples and zeros for the silent ones.

    Every sample is loud in the same number of passes, but no two samples in the same set of passes. So for any two samples there
    is a pass in which the first is loud and the second silent.
    """
    return list(_loud_samples(n))


@lru_cache(16)
def _loud_samples(n: int) -> tuple[Tensor, ...]:
    count = next(count for count in range(1, n + 1) if math.comb(count, (count + 1) // 2) >= n)
    loud = torch.zeros(n, count, dtype=torch.float32, device="cpu")
    for row, passes in zip(loud, islice(combinations(range(count), (count + 1) // 2), n), strict=True):
        row[list(passes)] = 1
    return tuple(loud.unbind(1))


class SilentReading:
    """The evidence that silences give about one tensor.

    Args:
        sketches: the sketches of its gradient in each pass, with the samples of :func:`loud_samples`.
        n: the number of samples.

    Attributes:
        first: the first of the sketches.
    """

    def __init__(self, sketches: Sequence[Sketch], n: int):
        self.first, self._sketches, self._n = sketches[0], sketches, n
        is_double = self.first.dtype is torch.float64
        self._forgiven, self._floor = FORGIVEN_IN_SILENCE_OF_DOUBLES if is_double else FORGIVEN_IN_SILENCE
        self._loud = torch.stack(loud_samples(n))
        self._known_sizes: dict[int, Tensor] = {}

    @property
    def largest(self) -> float:
        """The largest magnitude of the gradient in any pass."""
        return max(float(sketch.largest) for sketch in self._sketches)

    def _sizes(self, axis: int) -> Tensor:
        """How large each slice along an axis is in each pass, ``[passes, size]``."""
        if axis not in self._known_sizes:
            self._known_sizes[axis] = torch.stack([sketch.axes[axis].norm(dim=1) for sketch in self._sketches])
        return self._known_sizes[axis]

    def sizes(self, axis: int) -> Tensor:
        """How large each slice along an axis is when it is loud."""
        return self._sizes(axis).amax(0)

    def fits(self, placement: Placement) -> bool:
        """Whether every row is silent whenever its sample is."""
        sizes = self._sizes(placement.axis)
        size = sizes.amax(0)
        sample = placement.sample_of_index(len(size), self._n, size.device)
        loud = self._loud if sample is None else self._loud[:, sample.clamp(max=self._n - 1)]
        return bool(((sizes <= self._forgiven * size + self._floor * size.max()) | loud.bool()).all())

    def slice_fits(self, axis: int, sample: int) -> bool:
        """Whether the one slice that was sketched along an axis is silent whenever a sample is."""
        sizes = [float(sketch.slices[axis][1].norm()) for sketch in self._sketches]
        allowed = 1.01 * (self._forgiven * max(sizes) + 4 * self._floor * self._norm)
        return all(
            size <= allowed for size, loud in zip(sizes, self._loud[:, sample].tolist(), strict=True) if not loud
        )

    @property
    def _norm(self) -> float:
        return max(math.hypot(*[float(rows.norm()) for rows in sketch.axes.values()]) for sketch in self._sketches)

    def listed(self) -> Placement:
        """The placement of rows by the passes in which each row is loud, assuming that each row belongs to one sample."""
        sizes = self._sizes(0)
        size = sizes.amax(0)
        heard = (sizes > self._forgiven * size + self._floor * size.max()).long()
        bits = 2 ** torch.arange(len(heard), device="cpu")
        codes, order = (bits[:, None] * self._loud.long()).sum(0).sort()
        found = torch.searchsorted(codes, (bits[:, None] * heard).sum(0)).clamp(max=self._n - 1)
        return Placement(0, Layout.INDEXED, order[found])
