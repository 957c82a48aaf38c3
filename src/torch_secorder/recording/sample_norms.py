"""The squared norms that one backward pass finds for its samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from torch_secorder.errors import NonFiniteError, listed
from torch_secorder.recording.quantities import Part


@dataclass(frozen=True)
class SampleNorms:
    """The squared norms that one backward pass finds for its samples, before any scaling.

    Attributes:
        batch: how many samples the loss was over, N_b.
        squared_norms: ``[parameters, n]``, the squared gradient norms of each sample's share of the loss.
        reached: the positions of the parameters that the pass reached.
        rules: position -> the rules and algorithms that gave its numbers.
        parts: what the pass adds to the other quantities that are kept, by their names.
        skipped: how many samples were left out because their gradients are not finite.
        gradient_norms: the norms of the parameters' gradients, if they came to the host together with the samples.
    """

    batch: int
    squared_norms: Tensor
    reached: set[int]
    rules: Mapping[int, Iterable[str]]
    parts: dict[str, Part] = field(default_factory=dict)
    skipped: int = 0
    gradient_norms: Tensor | None = None

    def scaled(self, factor: float) -> SampleNorms:
        """The same with all squares multiplied."""
        if factor == 1:
            return self
        parts = {name: part.scaled(factor) for name, part in self.parts.items()}
        return replace(self, squared_norms=self.squared_norms * factor, parts=parts)

    def plus(self, other: SampleNorms) -> SampleNorms:
        """The same samples after another backward pass through the same forward, whose squares add to these."""
        parts = {
            name: self.parts[name].plus(part) if name in self.parts else part for name, part in other.parts.items()
        }
        return replace(other, squared_norms=self.squared_norms + other.squared_norms, parts=parts)

    def finite(self, names: Sequence[str], nonfinite: str) -> SampleNorms:
        """The samples whose gradients are finite; ``names`` are the parameters', for errors.

        Raises:
            NonFiniteError: if some are not and ``nonfinite`` is "raise", or if one cannot be taken out of a quantity any more.
        """
        # A sum of squares is finite only if each of them is. Only where it is not, it has to be told which one.
        if math.isfinite(self.squared_norms.detach().sum()):
            return self
        bad = ~self.squared_norms.isfinite()
        if not bool(bad.any()):  # The sum alone was too large for its dtype.
            return self
        rows = bad.any(0).nonzero().flatten().tolist()
        if nonfinite == "raise":
            hit = [names[position] for position in bad.any(1).nonzero().flatten().tolist()]
            raise NonFiniteError(
                f"the gradients of {listed(rows, 'sample')} are not finite, in {listed(hit, 'parameter')}, or too large to be "
                "squared in float32 (above 1e19: scale the loss down, or use float64); their batch "
                'is left out whole (FisherMonitor(nonfinite="skip") leaves out such samples alone)'
            )
        kept = (~bad.any(0)).nonzero().flatten()
        parts = {name: part.finite(bad, names) for name, part in self.parts.items()}
        return replace(self, squared_norms=self.squared_norms[:, kept], parts=parts, skipped=len(rows))
