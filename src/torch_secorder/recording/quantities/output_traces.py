"""Activation traces: the squared norms of the gradients in every module's output, and the output's own moments."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from torch_secorder.autograd.double_precision import sum_in_double_precision
from torch_secorder.capture.records import HookedModule, Record
from torch_secorder.capture.watched_calls import Moments
from torch_secorder.per_sample import Dense
from torch_secorder.recording.quantities.quantity import Part, Quantity


@dataclass(frozen=True)
class OutputNorms:
    """One call of a watched module.

    Attributes:
        squared_norms: the squared norms of the gradients in its output, ``[n]``; or only their sum, ``[1]``, where nothing says
            which sample is where.
        by_sample: whether there is one squared norm for each sample.
        moments: the output's moments.
    """

    squared_norms: Tensor
    by_sample: bool
    moments: Moments


Calls = dict[HookedModule, list[OutputNorms]]


class OutputTracesPart(Part):
    """Every call of each watched module in one backward pass."""

    def __init__(self, calls: Calls | None = None):
        self.calls: Calls = {} if calls is None else calls

    def on_output(self, record: Record, grad: Tensor, by_sample: bool) -> None:
        norms = Dense(grad if by_sample else grad[None]).squared_norm()
        self.calls.setdefault(record.site, []).append(OutputNorms(norms, by_sample, record.kept.moments))

    def tensors(self) -> list[Tensor]:
        return [value for calls in self.calls.values() for call in calls for value in _values(call)]

    def with_tensors(self, tensors: Iterable[Tensor]) -> OutputTracesPart:
        found = iter(tensors)

        def replaced(call: OutputNorms) -> OutputNorms:
            norms, values = next(found), next(found)
            return replace(call, squared_norms=norms, moments=replace(call.moments, values=values))

        return OutputTracesPart({site: list(map(replaced, calls)) for site, calls in self.calls.items()})

    def scaled(self, factor: float) -> OutputTracesPart:
        return OutputTracesPart(
            {
                site: [replace(call, squared_norms=factor * call.squared_norms) for call in calls]
                for site, calls in self.calls.items()
            }
        )

    def plus(self, other: OutputTracesPart) -> OutputTracesPart:
        both = {
            site: [
                replace(a, squared_norms=a.squared_norms + b.squared_norms)
                for a, b in zip(self.calls[site], calls, strict=True)
            ]
            if site in self.calls
            else calls
            for site, calls in other.calls.items()
        }
        return OutputTracesPart(self.calls | both)

    def finite(self, bad: Tensor, names: Sequence[str]) -> OutputTracesPart:
        kept = ~bad.any(0)

        def without_bad(call: OutputNorms) -> OutputNorms:
            # With several batches in one pass, or samples that are not told apart, nothing shows which numbers to leave out.
            known = call.by_sample and len(call.squared_norms) == len(kept)
            norms = call.squared_norms
            return replace(call, squared_norms=norms[kept.to(norms.device)] if known else norms[:1] * math.nan)

        return OutputTracesPart({site: list(map(without_bad, calls)) for site, calls in self.calls.items()})


def _values(call: OutputNorms) -> tuple[Tensor, Tensor]:
    return call.squared_norms, call.moments.values


class OutputTraces(Quantity):
    """For each module whose output was seen: its class, ``sum_n ||gradient in its output||^2``, and the output's moments.

    Attributes:
        sums: module name -> class name, sum of squares, and number, sum, sum of squares, minimum and maximum of the outputs.
    """

    name: ClassVar[str] = "activations"
    watches_outputs: ClassVar[bool] = True

    def __init__(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]], how: Any = True):
        super().__init__(names, shapes, how)
        self.sums: dict[str, tuple[str, float, list[float]]] = {}

    @staticmethod
    def part(names: Sequence[str], how: Any) -> OutputTracesPart:
        return OutputTracesPart()

    def add(self, part: OutputTracesPart, t: Tensor, scale: float) -> None:
        sums = dict(self.sums)
        for site in sorted(part.calls, key=lambda site: site.number):
            calls = part.calls[site]
            for call in calls:
                squares = float(sum_in_double_precision(call.squared_norms)) * scale
                _add(sums, site.name, site.kind, squares, call.moments.pooled())
        self.sums = sums

    def merge(self, other: OutputTraces) -> None:
        sums = dict(self.sums)
        for name, (kind, squares, moments) in other.sums.items():
            _add(sums, name, kind, squares, moments)
        self.sums = sums

    def rows(self, n: int, factor: float) -> list[dict[str, Any]]:
        """A row of a table for each module, its trace ``factor`` times the mean over n samples."""
        rows = []
        for name, (kind, squares, (numel, total, total_squares, minimum, maximum)) in self.sums.items():
            mean = total / numel if numel else math.nan
            figures = {
                "mean": mean,
                "std": math.sqrt(max(0.0, total_squares / numel - mean**2)) if numel else math.nan,
                "min": minimum,
                "max": maximum,
            }
            row = {"module": name, "module_type": kind, "activation_trace": squares / n * factor, "numel": int(numel)}
            rows.append(row | figures)
        return rows

    def state(self) -> dict[str, Any]:
        return {"outputs": dict(self.sums)}

    def load(self, state: Mapping[str, Any]) -> None:
        self.sums = {
            name: (kind, squares, list(moments)) for name, (kind, squares, moments) in state["outputs"].items()
        }


def _add(
    sums: dict[str, tuple[str, float, list[float]]], name: str, kind: str, squares: float, moments: list[float]
) -> None:
    _, before, seen = sums.get(name, (kind, 0.0, [0.0, 0.0, 0.0, math.inf, -math.inf]))
    totals = [a + b for a, b in zip(seen[:3], moments[:3], strict=True)]
    sums[name] = (kind, before + squares, [*totals, min(seen[3], moments[3]), max(seen[4], moments[4])])
