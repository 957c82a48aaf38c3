"""What a backward pass says of its samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from torch_secorder.errors import NonFiniteError
from torch_secorder.per_sample import SquareSum


@dataclass
class Output:
    """One call of a module whose outputs are of interest.

    Attributes:
        norms: ``[n]``, squared norms of the gradients in the output.
        moments: of the output; see :func:`torch_secorder.capture.module_hooks.moments`.
    """

    norms: Tensor
    moments: Tensor


@dataclass
class Samples:
    """What a backward pass says of its samples, in the user's units still.

    Attributes:
        batch: how many samples the loss was over, N_b.
        norms: ``[parameters, n]``, squared norms of the gradients of each sample's share of the loss.
        squares: position -> sums of those gradients squared entry by entry, where the diagonal is wanted.
        reached: positions that the pass reached.
        rules: position -> the rules and algorithms that gave its numbers.
        outputs: module name -> its calls, where activations are wanted.
        skipped: how many samples were left out because their gradients are not finite.
    """

    batch: int
    norms: Tensor
    squares: dict[int, list[SquareSum]]
    reached: set[int]
    rules: Mapping[int, Iterable[str]]
    outputs: dict[str, list[Output]] = field(default_factory=dict)
    skipped: int = 0

    def times(self, factor: float) -> Samples:
        """The same with all squares multiplied."""
        if factor == 1:
            return self
        squares = {position: [one.times(factor) for one in several] for position, several in self.squares.items()}
        outputs = {
            name: [replace(call, norms=factor * call.norms) for call in calls] for name, calls in self.outputs.items()
        }
        return replace(self, norms=self.norms * factor, squares=squares, outputs=outputs)

    def plus(self, other: Samples) -> Samples:
        """The same samples after another backward pass through the same forward, whose squares add to these."""
        squares = {p: [SquareSum.summed([*self.squares.get(p, []), *several])] for p, several in other.squares.items()}
        outputs = {
            name: [replace(a, norms=a.norms + b.norms) for a, b in zip(self.outputs[name], calls, strict=True)]
            if name in self.outputs
            else calls
            for name, calls in other.outputs.items()
        }
        return replace(
            other, norms=self.norms + other.norms, squares=self.squares | squares, outputs=self.outputs | outputs
        )

    def output_sums(self, types: Mapping[str, str], factor: float = 1.0) -> dict[str, tuple[str, float, list[float]]]:
        """Of each module's output over its calls: module -> its type, sum of squared gradients times a factor, moments."""
        return {
            name: (kind, *_sums(self.outputs[name], factor)) for name, kind in types.items() if name in self.outputs
        }

    def finite(self, names: Sequence[str], nonfinite: str) -> Samples:
        """Those whose gradients are finite, given the parameters' names.

        Raises:
            NonFiniteError: if some are not and ``nonfinite`` is "raise", or if one has been added to the diagonal.
        """
        bad = ~self.norms.isfinite()
        if not bool(bad.any()):
            return self
        hit = [names[position] for position in bad.any(1).nonzero().flatten().tolist()]
        rows = bad.any(0).nonzero().flatten().tolist()
        if nonfinite == "raise":
            raise NonFiniteError(
                f"the gradients of {_listed(rows, 'sample')} are not finite, in {_listed(hit, 'parameter')}; their batch "
                'is left out whole (FisherMonitor(nonfinite="skip") leaves out such samples alone)'
            )
        kept = (~bad.any(0)).nonzero().flatten()
        late = [p for p in self.squares if bool(bad.any(0).logical_and(~bad[p]).any())]
        if late:
            raise NonFiniteError(
                f"{_listed(rows, 'sample')}: the gradient became infinite half-way through the backward pass, after "
                f"{names[late[0]]} had been added to the diagonal; the batch is left out"
            )
        norms = self.norms[:, kept]
        finite = {name: [Output(_finite(c.norms), c.moments) for c in calls] for name, calls in self.outputs.items()}
        return replace(self, norms=norms, outputs=finite, skipped=len(rows))


def _sums(calls: list[Output], factor: float) -> tuple[float, list[float]]:
    squares = sum(float(call.norms.double().sum()) for call in calls) * factor
    count, total, total_squares, minimum, maximum = torch.stack([call.moments for call in calls]).unbind(1)
    moments = torch.stack([count.sum(), total.sum(), total_squares.sum(), minimum.min(), maximum.max()])
    return squares, moments.tolist()


def _finite(norms: Tensor) -> Tensor:
    return norms[norms.isfinite()]


def _listed(items: list[object] | list[str] | list[int], noun: str) -> str:
    shown = ", ".join(str(item) for item in items[:5])
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return f"{noun}{'s' if len(items) > 1 else ''} {shown}{more}"
