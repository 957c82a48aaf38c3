"""Turns statistics into DataFrames."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from torch_secorder.arguments import By, described
from torch_secorder.errors import ArgumentError
from torch_secorder.model.parameters import Parameter
from torch_secorder.recording.quantities import OutputTraces, SampleRows
from torch_secorder.results.statistics import Statistics
from torch_secorder.tables import table

# What a row of activations says of a module's output.
OUTPUT_FIGURES = ("module_type", "activation_trace", "numel", "mean", "std", "min", "max")


@dataclass(frozen=True)
class Figures:
    """The numbers of a row, whether it is one parameter or a group."""

    fisher_trace: float
    fisher_trace_stderr: float
    fisher_trace_share: float
    fisher_mean: float
    grad_sq_norm: float
    rule: str


class Report:
    """Makes the tables of one set of statistics.

    Args:
        parameters: the analyzed parameters.
        statistics: their sums over samples.
        reduction: "mean" or "sum".
        fisher: which Fisher the statistics are of.
    """

    def __init__(self, parameters: Sequence[Parameter], statistics: Statistics, reduction: str, fisher: str):
        self._parameters, self._statistics = list(parameters), statistics
        self._reduction, self._fisher = reduction, fisher
        self._scale = statistics.n if reduction == "sum" else 1  # c N
        self._means: list[float] = statistics.mean.tolist()

    @cached_property
    def trace(self) -> float:
        """The total."""
        return float(self._statistics.mean.sum()) * self._scale

    @property
    def trace_stderr(self) -> float:
        """The standard error of the total."""
        return self._figures(list(range(len(self._parameters)))).fisher_trace_stderr

    def table(self, by: By = None) -> pd.DataFrame:
        """The table by parameter, or grouped."""
        frame = self._by_parameter() if by is None else self._grouped(by)
        statistics = self._statistics
        frame.attrs.update(self._facts())
        frame.attrs["total_stderr"] = self.trace_stderr
        if statistics.n_skipped:
            frame.attrs["n_skipped"] = statistics.n_skipped
        if passes := statistics.gradients.passes:
            frame.attrs["mean_inverse_batch_size"] = statistics.gradients.inverse_batch_sizes / passes
        return frame

    def _facts(self) -> dict[str, str | int]:
        """The facts that a reader of the numbers must know."""
        n, passes, skipped = self._statistics.n, self._statistics.passes, self._statistics.skipped_passes
        counts = {"n_samples": n, "n_passes": passes, "skipped_passes": skipped}
        return {"reduction": self._reduction, "fisher": self._fisher, **counts}

    def per_sample(self) -> pd.DataFrame:
        """t_{n,p}: a row per sample in backward order, a column per parameter."""
        quantity = self._statistics.quantities["per_sample"]
        assert isinstance(quantity, SampleRows)
        rows = [block.numpy() for block in quantity.blocks]
        frames = [pd.DataFrame(block, columns=self._statistics.names) for block in rows]
        found = pd.concat(frames, ignore_index=True)
        ids = [one for block in quantity.ids for one in block]
        if any(one is not None for one in ids):
            found.index = pd.Index(ids)
        return found.rename_axis(index="sample", columns="parameter")

    def activations(self) -> pd.DataFrame:
        """A row for each module whose output was seen."""
        quantity = self._statistics.quantities["activations"]
        assert isinstance(quantity, OutputTraces)
        rows = quantity.rows(self._statistics.n, self._scale)
        return table(rows, "module", OUTPUT_FIGURES, **self._facts())

    def _by_parameter(self) -> pd.DataFrame:
        rows = [vars(p) | vars(self._figures([i])) for i, p in enumerate(self._parameters)]
        names = [row.pop("name") for row in rows]
        return pd.DataFrame(rows, index=pd.Index(names, name="parameter"))

    def _grouped(self, by: By) -> pd.DataFrame:
        label, key = _grouping(by)
        groups: dict[object, list[int]] = {}
        for position, parameter in enumerate(self._parameters):
            groups.setdefault(key(parameter), []).append(position)
        rows = []
        for name, positions in groups.items():
            numel = sum(self._parameters[position].numel for position in positions)
            counts = {"n_parameters": len(positions), "numel": numel}
            rows.append({label: name} | counts | vars(self._figures(positions)))
        return pd.DataFrame(rows).set_index(label)

    def _figures(self, positions: list[int]) -> Figures:
        statistics, total = self._statistics, self.trace
        trace = sum(self._means[position] for position in positions) * self._scale
        numel = sum(self._parameters[position].numel for position in positions)
        rules = (rule for position in positions for rule in statistics.rules[position] or ["unused"])
        return Figures(
            fisher_trace=trace,
            fisher_trace_stderr=math.sqrt(statistics.squared_norms.variance_of_sum(positions) / statistics.n)
            * self._scale,
            fisher_trace_share=trace / total if total else math.nan,
            fisher_mean=trace / numel if numel else math.nan,
            grad_sq_norm=statistics.gradients.mean_of(positions),
            rule=" + ".join(dict.fromkeys(rules)),
        )


def _grouping(by: By) -> tuple[str, Callable[[Parameter], object]]:
    if by == "module":
        return "module", lambda parameter: parameter.module
    if by == "type":
        return "type", lambda parameter: parameter.module_type
    if callable(by):
        return "group", lambda parameter: by(parameter.name)
    raise ArgumentError(f'by must be None, "module", "type" or a function of a parameter\'s name, not {described(by)}')
