"""The samples of one forward, while a backward pass goes through it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from torch_secorder.capture.records import Record
from torch_secorder.per_sample import PerSampleGradient


class Projection(NamedTuple):
    """The captured gradient of a parameter along one direction, to be compared with autograd's.

    Attributes:
        along: the gradient along the direction.
        size: a bound on the size of what was added up.
        dtype: the narrowest one in which products were taken; a model in float64 may have layers that compute in float32.
    """

    along: Tensor
    size: float
    dtype: torch.dtype

    def plus(self, other: Projection) -> Projection:
        """The same for two uses of the parameter. They may cancel; the rounding error goes by the size of each use."""
        return Projection(self.along + other.along, self.size + other.size, narrowest(self.dtype, other.dtype))


def narrowest(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype with the fewest digits."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


@dataclass(eq=False)
class SampleBatch:
    """One batch of samples: a forward that the backward pass reached.

    Attributes:
        squared_norms: position of a parameter -> ``[n]``, in the units of the backward pass.
        roots: positions for which ``squared_norms`` holds norms so far; they are squared together later.
        batched: for parameters that were computed together, their positions and their squared norms, ``[positions, n]``.
        settled: positions that have their squared norms, or will have.
        held: position -> the sum so far, for parameters that are used more than once.
        shared: call without a batch axis -> ``[n, *shape of its output]``, the gradient of its output for every sample.
        silent: positions of which some use has a zero gradient in a pass that is differentiated itself.
        projections: position -> its gradient along one direction, where that is compared with autograd's.
    """

    n: int
    squared_norms: dict[int, Tensor] = field(default_factory=dict)
    roots: set[int] = field(default_factory=set)
    batched: list[tuple[list[int], Tensor]] = field(default_factory=list)
    settled: set[int] = field(default_factory=set)
    held: dict[int, PerSampleGradient] = field(default_factory=dict)
    shared: dict[Record, Tensor] = field(default_factory=dict)
    silent: set[int] = field(default_factory=set)
    projections: dict[int, Projection] = field(default_factory=dict)

    def stacked(self) -> tuple[list[int], Tensor]:
        """The positions that have squared norms, and these norms, ``[positions, n]`` on one device and in at least float32."""
        positions = list(self.squared_norms)
        parts = [torch.stack(alike(list(self.squared_norms.values())))] if positions else []
        for several, norms in self.batched:
            positions.extend(several)
            parts.append(norms)
        if len(parts) == 1:
            return positions, parts[0]
        return positions, torch.cat(alike(parts)) if parts else torch.zeros(
            0, self.n, dtype=torch.float32, device="cpu"
        )


def alike(values: list[Tensor]) -> list[Tensor]:
    """The same numbers on the first tensor's device and in the widest dtype, so that they can be concatenated."""
    first, same = values[0], True
    for value in values:
        same = same and value.dtype == first.dtype and value.device == first.device
    if same:
        return values
    dtype = functools.reduce(torch.promote_types, [value.dtype for value in values])
    return [value.to(first.device, dtype) for value in values]


def side_by_side(stacked: Sequence[tuple[list[int], Tensor]], count: int) -> Tensor:
    """The squared norms of all batches, ``[count parameters, samples]``, zeros for what the pass did not reach.

    Args:
        stacked: for each batch, positions and their squared norms.
        count: the number of parameters.
    """
    columns: list[Tensor] = []
    for positions, values in stacked:
        if positions != list(range(count)):
            index = torch.tensor(positions, device=values.device, dtype=torch.long)
            values = values.new_zeros(count, values.shape[1]).index_copy(0, index, values)
        columns.append(values if not columns else values.to(columns[0]))
    return columns[0] if len(columns) == 1 else torch.cat(columns, 1)
