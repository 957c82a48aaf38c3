"""The Fisher diagonal: per-sample gradients squared entry by entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from torch_secorder.errors import NonFiniteError, listed
from torch_secorder.per_sample import PerSampleGradient, SquareSum, halving_on_oom
from torch_secorder.recording.quantities.quantity import Part, Quantity


class DiagonalPart(Part):
    """Of one backward pass, for each position in the parameter table, ``sum_n G_n ** 2``; factored where that is possible."""

    def __init__(self, sums: dict[int, list[SquareSum]] | None = None):
        self.sums = {} if sums is None else sums

    def on_form(self, position: int, form: PerSampleGradient, squared_norms: Tensor) -> None:
        finite = squared_norms.isfinite()
        if bool(finite.any()):
            form = form if bool(finite.all()) else form.select(finite.nonzero().squeeze(1))
            new = halving_on_oom(form, SquareSum.of, lambda a, b: SquareSum.summed([a, b]))
            self.sums.setdefault(position, []).append(new)

    def scaled(self, factor: float) -> DiagonalPart:
        return DiagonalPart({position: [one.times(factor) for one in found] for position, found in self.sums.items()})

    def plus(self, other: DiagonalPart) -> DiagonalPart:
        both = {p: [SquareSum.summed([*self.sums.get(p, []), *found])] for p, found in other.sums.items()}
        return DiagonalPart(self.sums | both)

    def finite(self, bad: Tensor, names: Sequence[str]) -> DiagonalPart:
        rows = bad.any(0)
        late = next((p for p in self.sums if bool(rows.logical_and(~bad[p]).any())), None)
        if late is not None:
            raise NonFiniteError(
                f"{listed(rows.nonzero().flatten().tolist(), 'sample')}: the gradient became infinite half-way through the "
                f"backward pass, after {names[late]} had been added to the diagonal; the batch is left out"
            )
        return self


class Diagonal(Quantity):
    """``sum_n g_n ** 2``, a tensor for each parameter.

    Attributes:
        totals: the sums; empty before the first pass, and a single zero for a parameter that no pass has reached.
    """

    name: ClassVar[str] = "diagonal"
    takes_forms: ClassVar[bool] = True

    def __init__(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]):
        super().__init__(names, shapes)
        self.totals: list[Tensor] = []

    @staticmethod
    def part() -> DiagonalPart:
        return DiagonalPart()

    def add(self, part: DiagonalPart, t: Tensor, scale: float) -> None:
        self.torn = True
        self.totals = list(self.totals) or [torch.zeros(()) for _ in self.names]
        for position, several in part.sums.items():
            for one in several:
                total = self.totals[position]
                # A 0-dim total stands for a parameter that no pass has reached, or is that of a single number.
                in_place = total.dim() > 0
                value = one.times(scale).added(total if in_place else None)
                self.totals[position] = value if in_place or value.dim() else value + total.to(value.device)
        self.torn = False

    def merge(self, other: Diagonal) -> None:
        if other.totals:
            mine = self.totals or [torch.zeros(())] * len(self.names)
            pairs = zip(mine, other.totals, strict=True)
            self.totals = [b.to(a.device) + a if a.dim() else b + a.to(b.device) for a, b in pairs]

    def scaled(self, factor: float) -> dict[str, Tensor]:
        """Parameter name -> the sum times a factor, in the parameter's shape."""
        found = zip(self.names, self.totals, self.shapes, strict=True)
        return {name: (factor * total).expand(shape) for name, total, shape in found}

    def state(self) -> dict[str, Any]:
        return {"squares": [value.clone() for value in self.totals]}

    def load(self, state: Mapping[str, Any]) -> None:
        self.totals = [value.clone() for value in state["squares"]]
