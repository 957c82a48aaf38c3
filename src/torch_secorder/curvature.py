"""Where the decisions get their Fisher from: a monitor, a report, or a report that was read back from a file."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch_secorder.autograd.double_precision import widest_dtype
from torch_secorder.errors import ArgumentError, LifecycleError
from torch_secorder.model.channels import ChannelSums, channel_axis
from torch_secorder.model.names import plain_name
from torch_secorder.model.parameters import refuse_complex, unwrapped
from torch_secorder.model.ranks import refuse_dtensors
from torch_secorder.recording.quantities.layout import Layout, sums_in
from torch_secorder.results.results import Results, results_of
from torch_secorder.tables import ATTRIBUTES, shape_of

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("empirical", "exact", "sampled", "observed")
PREDICTIVE = ("exact", "sampled")  # whose quadratic form is the second-order term of the KL divergence


@dataclass(frozen=True)
class Curvature:
    """The Fisher of one model, per sample whatever the reduction was.

    Attributes:
        parameters: name -> the model's own tensor, in the order of the report.
        axes: name -> the axis of the parameter that counts output channels.
        traces: name -> the mean over samples of ``||g_{n,p}||^2``.
        diagonal: name -> the mean over samples of ``g_{n,p} ** 2``, entry by entry, or its mean over each channel in all of the
            channel's entries; empty where only traces are known.
        basis: "diagonal", "channels" where some of that is known by channels only, or "trace".
        fisher: "empirical", "exact", "sampled" or "observed".
        n_samples: how many samples were seen.
        divisor: what the source's own numbers were divided by to get those per sample.
    """

    parameters: dict[str, Tensor]
    axes: dict[str, int]
    traces: dict[str, float]
    diagonal: dict[str, Tensor]
    fisher: str
    n_samples: int
    divisor: float
    basis: str

    def of(self, name: str) -> Tensor:
        """The diagonal's part of a parameter: as far as it is known, else its mean in every entry."""
        parameter = self.parameters[name]
        if name in self.diagonal:
            return self.diagonal[name]
        return torch.full_like(
            parameter, self.traces[name] / max(1, parameter.numel()), dtype=widest_dtype(parameter.device)
        )


def curvature(
    model: nn.Module,
    source: Results | pd.DataFrame,
    *,
    fisher: str | None = None,
    diagonal: Mapping[str, Tensor] | None = None,
) -> Curvature:
    """What a monitor or a report says of a model, per sample.

    Args:
        model: the model that was analyzed.
        source: a :class:`~torch_secorder.FisherMonitor` or other results, a report by parameter, or one read back from a
            file with the columns ``reduction``, ``fisher`` and ``n_samples``.
        fisher: which Fisher it is, where the source doesn't say so.
        diagonal: the Fisher diagonal that belongs to a report, in the report's scaling.

    Raises:
        ArgumentError: if the report is of another model, lacks columns, or doesn't say how it is scaled.
        UnsupportedError: if the model's parameters are spread over ranks.
        LifecycleError: if the monitor saw no sample.
    """
    if isinstance(source, nn.Module) and not isinstance(model, nn.Module):
        raise ArgumentError("the model comes first, and then the monitor, results or report that say its Fisher")
    source = results_of(source)
    layout: Layout = True
    if isinstance(source, Results):
        report = source.report()
        if diagonal is None:
            try:
                diagonal, layout = source.diagonal, source.statistics.keeps["diagonal"]
            except LifecycleError:
                diagonal = None
    else:
        report = source
    names, traces, shapes = _columns(report)
    facts = _facts(report)
    kind = fisher if fisher is not None else facts["fisher"]
    if kind not in KINDS:
        raise ArgumentError(f"fisher must be one of {', '.join(map(repr, KINDS))}, not {kind!r}")
    n = int(facts["n_samples"])
    divisor = float(n) if facts["reduction"] == "sum" else 1.0
    model = unwrapped(model)
    owners = {plain_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    known = {plain_name(name): p for name, p in model.named_parameters()}
    refuse_dtensors(model, "a decision by curvature")
    refuse_complex(model, "a decision by curvature")
    parameters = {}
    for name, shape in zip(names, shapes, strict=True):
        if name not in known:
            raise ArgumentError(
                f"the report is of another model: {type(model).__name__} has no parameter {name!r}; make a report of this "
                "model, in the state that it is in (pruning and parametrizations rename parameters)"
            )
        if shape is not None and shape != tuple(known[name].shape):
            raise ArgumentError(
                f"the report is of another model: {name} has shape {shape} there and {tuple(known[name].shape)} here"
            )
        parameters[name] = known[name].detach()
    if unknown := [name for name in diagonal or () if name not in parameters]:
        raise ArgumentError(f"the diagonal is of another model: the report has no parameter {unknown[0]!r}")
    return Curvature(
        parameters,
        {name: channel_axis(owners[name.rpartition(".")[0]]) for name in names},
        {name: trace / divisor for name, trace in zip(names, traces, strict=True)},
        {
            name: _entries(name, value, parameters[name], sums_in(layout, name)) / divisor
            for name, value in (diagonal or {}).items()
        },
        kind,
        n,
        divisor,
        _basis(diagonal, layout),
    )


def _basis(diagonal: Mapping[str, Tensor] | None, layout: Layout) -> str:
    if not diagonal:
        return "trace"
    return "channels" if any(sums_in(layout, name) is not None for name in diagonal) else "diagonal"


def warn_if_no_prediction(fisher: str) -> None:
    """Warn that this Fisher says nothing of the KL divergence."""
    if fisher not in PREDICTIVE:
        warnings.warn(
            f"the report is of the {fisher} Fisher, whose labels are those of the data: half its quadratic form predicts no KL "
            'divergence, though it ranks layers; use fisher_report(..., fisher="sampled") or "exact", or say '
            'fisher="sampled" to the monitor or the gates around labels that are drawn from the prediction',
            UserWarning,
            stacklevel=3,
        )


def _columns(report: Any) -> tuple[list[str], list[float], list[tuple[int, ...] | None]]:
    columns = getattr(report, "columns", None)
    if columns is None:
        raise ArgumentError(f"expected a FisherMonitor, results or a report (a DataFrame), not {type(report).__name__}")
    if "parameter" in columns:
        report = report.set_index("parameter")
    if "n_parameters" in columns:
        raise ArgumentError("the report is grouped; pass the one by parameter, made without by=")
    if "fisher_trace" not in columns:
        raise ArgumentError("the report lacks the column fisher_trace; pass what report() or fisher_report() returned")
    names = [str(name) for name in report.index]
    if report["fisher_trace"].dtype.kind not in "iuf":
        raise ArgumentError("the column fisher_trace has entries that are no numbers")
    traces = [float(trace) for trace in report["fisher_trace"]]
    if bad := [name for name, trace in zip(names, traces, strict=True) if not (math.isfinite(trace) and trace >= 0)]:
        raise ArgumentError(f"fisher_trace of {', '.join(bad)} is not a number that is 0 or more")
    shapes: list[tuple[int, ...] | None] = [None] * len(names)
    if "shape" in columns:
        shapes = [shape_of(shape) for shape in report["shape"]]
    return names, traces, shapes


def _facts(report: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for name in ATTRIBUTES:
        if name in report.columns:
            values = list(dict.fromkeys(report[name]))
            if len(values) != 1:
                raise ArgumentError(f"the report has {len(values)} values of {name}; it must be one report")
            facts[name] = values[0]
        elif name in report.attrs:
            facts[name] = report.attrs[name]
        else:
            raise ArgumentError(
                f"the report doesn't say its {name}, neither in attrs nor as a column: keep it when it is written to a file, "
                "with report.assign(**report.attrs).to_csv(path), or set report.attrs"
            )
    if facts["reduction"] not in ("mean", "sum") or not (isinstance(n := facts["n_samples"], Integral) and int(n) >= 1):
        raise ArgumentError(f"the report has reduction={facts['reduction']!r} and n_samples={facts['n_samples']!r}")
    return facts


def _entries(name: str, diagonal: Tensor, parameter: Tensor, channels: ChannelSums | None) -> Tensor:
    """A number for each entry of a parameter: the diagonal's, or the mean of its channel."""
    if channels is not None:
        diagonal = channels.spread(diagonal, parameter.shape)
    if diagonal.shape != parameter.shape:
        raise ArgumentError(
            f"the diagonal of {name} has shape {tuple(diagonal.shape)}, the parameter {tuple(parameter.shape)}"
        )
    return diagonal.detach().to(parameter.device)
