"""The samples of one forward, while a backward pass goes through it."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_secorder.capture.records import Call, HookedModule, Record
from torch_secorder.errors import CurvatureError
from torch_secorder.per_sample import PerSampleGradient, halving_on_oom

_SQUARED_NORM = operator.methodcaller("squared_norm")


@dataclass
class SampleBatch:
    """One batch of samples: a forward that the backward pass reached.

    Attributes:
        squared_norms: position of a parameter -> ``[n]``, in the units of the backward pass.
        batched: the same for parameters that were taken together: their positions, ``[positions, n]``.
        settled: positions that have their squared norms, or will have.
        held: position -> the sum so far, for parameters that are used more than once.
        shared: call without a batch axis -> ``[n, *shape of its output]``, the gradient of its output for every sample.
        projections: position -> its gradient along one direction, where that is compared with autograd's, and a bound on
            the sizes of what was added up.
    """

    n: int
    squared_norms: dict[int, Tensor] = field(default_factory=dict)
    batched: list[tuple[list[int], Tensor]] = field(default_factory=list)
    settled: set[int] = field(default_factory=set)
    held: dict[int, PerSampleGradient] = field(default_factory=dict)
    shared: dict[Record, Tensor] = field(default_factory=dict)
    projections: dict[int, tuple[Tensor, float]] = field(default_factory=dict)

    def stacked(self) -> tuple[list[int], Tensor]:
        """All squared norms, ``[positions, n]`` on one device and in at least float32, and whose they are."""
        positions, parts = list(self.squared_norms), [part for _, part in self.batched]
        positions.extend(itertools.chain.from_iterable([several for several, _ in self.batched]))
        if not self.squared_norms and len(parts) == 1:
            return positions, parts[0]
        parts = [*[norms[None] for norms in self.squared_norms.values()], *parts]
        if len({(x.dtype, x.device) for x in parts}) > 1:
            dtype = functools.reduce(torch.promote_types, [x.dtype for x in parts])
            parts = [x.to(parts[0].device, dtype) for x in parts]
        return positions, torch.cat(parts) if parts else torch.zeros(0, self.n)


def all_squared_norms(batches: Sequence[SampleBatch], count: int) -> tuple[set[int], Tensor]:
    """Of ``count`` parameters the positions that the pass reached, and ``[count, samples]``, zeros for what it did not reach."""
    reached: set[int] = set()
    columns: list[Tensor] = []
    for batch in batches:
        positions, values = batch.stacked()
        reached.update(positions)
        if positions != list(range(count)):
            index = torch.tensor(positions, device=values.device, dtype=torch.long)
            values = values.new_zeros(count, batch.n).index_copy(0, index, values)
        columns.append(values if not columns else values.to(columns[0]))
    return reached, columns[0] if len(columns) == 1 else torch.cat(columns, 1)


def forms_of(site: HookedModule, call: Call) -> dict[str, PerSampleGradient]:
    """What a module's rule says of a call."""
    try:
        forms: dict[str, PerSampleGradient] = site.rule(site.module, call, site.shapes)
    except CurvatureError as error:
        raise type(error)(f"{site}: {error}") from error
    return forms


def squared_norms_of(form: PerSampleGradient) -> Tensor:
    """A form's squared norms, of half of the samples at a time where memory runs out."""
    return halving_on_oom(form, _SQUARED_NORM, lambda a, b: torch.cat([a, b]))
