"""The samples of one forward, while a backward pass goes through it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_secorder.capture.records import Call, Record, Site
from torch_secorder.errors import CurvatureError
from torch_secorder.per_sample import PerSampleGradient, SquareSum, halving_on_oom
from torch_secorder.recording.sample_norms import Output


@dataclass
class Block:
    """One batch of samples: a forward that the backward pass reached.

    Attributes:
        norms: position of a parameter -> ``[n]``, its squared norms in the units of the backward pass.
        several: the same for parameters that were taken together: their positions, ``[positions, n]``.
        settled: positions that have their norms, or will have.
        held: position -> the sum so far, for parameters that are used more than once.
        shared: call without a batch axis -> ``[n, *shape of its output]``, the gradient of its output for every sample.
        outputs: module name -> its calls, where activations are wanted.
        projections: position -> its gradient along one direction, where that is compared with autograd's, and a bound on
            the sizes of what was added up.
    """

    n: int
    norms: dict[int, Tensor] = field(default_factory=dict)
    several: list[tuple[list[int], Tensor]] = field(default_factory=list)
    settled: set[int] = field(default_factory=set)
    squares: dict[int, SquareSum] = field(default_factory=dict)
    held: dict[int, PerSampleGradient] = field(default_factory=dict)
    shared: dict[Record, Tensor] = field(default_factory=dict)
    outputs: dict[str, list[Output]] = field(default_factory=dict)
    projections: dict[int, tuple[Tensor, float]] = field(default_factory=dict)

    def stacked(self) -> tuple[list[int], Tensor]:
        """All squared norms, ``[positions, n]`` on one device and in at least float32, and whose they are."""
        rows, parts = list(self.norms.values()), [part for _, part in self.several]
        if len({(x.dtype, x.device) for x in (*rows, *parts)}) > 1:
            some = (rows or parts)[0]
            dtype = functools.reduce(torch.promote_types, {x.dtype for x in (*rows, *parts)})
            rows, parts = ([x.to(some.device, dtype) for x in values] for values in (rows, parts))
        parts = [torch.stack(rows), *parts] if rows else parts
        positions = itertools.chain(self.norms, *(several for several, _ in self.several))
        return list(positions), parts[0] if len(parts) == 1 else torch.cat(parts)


def all_norms(blocks: Sequence[Block], count: int) -> tuple[set[int], Tensor]:
    """Of ``count`` parameters the positions that the pass reached, and ``[count, samples]``, zeros for what it did not reach."""
    found = [block.stacked() for block in blocks]
    some, everything = found[0][1], list(range(count))
    columns = []
    for positions, values in found:
        if positions != everything:
            index = torch.tensor(positions, device=some.device)
            values = some.new_zeros(len(everything), values.shape[1]).index_copy(0, index, values.to(some))
        columns.append(values)
    return {p for positions, _ in found for p in positions}, columns[0] if len(columns) == 1 else torch.cat(columns, 1)


def forms_of(site: Site, call: Call) -> dict[str, PerSampleGradient]:
    """What a site's rule says of a call."""
    try:
        forms: dict[str, PerSampleGradient] = site.rule(site.module, call, site.shapes)
    except CurvatureError as error:
        raise type(error)(f"{site}: {error}") from error
    return forms


def squared_norms_of(form: PerSampleGradient) -> Tensor:
    """A form's squared norms, of half of the samples at a time where memory runs out."""
    return halving_on_oom(form, lambda part: part.squared_norm(), lambda a, b: torch.cat([a, b]))
