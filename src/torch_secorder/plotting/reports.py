"""Pictures of reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch_secorder.errors import ArgumentError
from torch_secorder.plotting.axes import (
    BLUE,
    COLORS,
    MARKERS,
    MOST_NAMES,
    axes_of,
    check_numbers,
    label_of,
    matplotlib,
    name_rows,
    percent,
    short_names,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def bars(report: pd.DataFrame, column: str = "fisher_trace", *, top: int | None = None, ax: Axes | None = None) -> Axes:
    """Horizontal bars, one per row, with the standard errors of ``fisher_trace`` and each row's share of the sum.

    Args:
        report: a report by parameter, by module, or by anything else.
        column: the column that sets the bar lengths.
        top: draw only this many rows, those with the longest bars, in the report's order.
        ax: where to draw.

    Raises:
        ArgumentError: if the report lacks the column or has no row.

    Example:
        >>> import torch
        >>> from torch_secorder import fisher_report
        >>> from torch_secorder.plotting import bars
        >>> layers = torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
        >>> model = torch.nn.Sequential(*layers)
        >>> options = {"fisher": "exact", "progress": False, "by": "module"}
        >>> report = fisher_report(model, None, (torch.randn(32, 4), None), **options)
        >>> [label.get_text() for label in bars(report).get_yticklabels()]
        ['0', '2']
    """
    check_numbers(report, column)
    if top is not None:
        report = report.loc[sorted(range_of_largest(report[column], top), key=list(report.index).index)]
    ax = axes_of(ax, height=0.28 * len(report) + 1.4)
    values = [float(v) for v in report[column]]
    errors = None
    if column == "fisher_trace" and "fisher_trace_stderr" in report.columns:
        errors = [0.0 if math.isnan(e) else float(e) for e in report["fisher_trace_stderr"]]
    container = ax.barh(
        range(len(values)),
        values,
        xerr=errors,
        height=0.7,
        color=BLUE,
        error_kw={"ecolor": "#333333", "capsize": 2, "lw": 1},
    )
    if column == "fisher_trace" and "fisher_trace_share" in report.columns:
        labels = [percent(share) for share in report["fisher_trace_share"]]
        ax.bar_label(container, labels, padding=5, fontsize="small", color="#444444")
        ax.margins(x=0.12)
    name_rows(ax, report)
    ax.set_xlim(left=0)
    ax.set_xlabel(label_of(column, report, errors is not None))
    if column == "fisher_trace_share":
        ax.xaxis.set_major_formatter(matplotlib("ticker").PercentFormatter(1))
    return ax


def heat_strip(report: pd.DataFrame, column: str = "fisher_mean", *, log: bool = True, ax: Axes | None = None) -> Axes:
    """A strip of color over the depth of the model: one cell per row, in order.

    Args:
        report: a report.
        column: the column that the colors show; by default the Fisher trace per weight.
        log: whether the colors are logarithmic; if so, zeros are gray.
        ax: where to draw.

    Raises:
        ArgumentError: if the report lacks the column or has no row.

    Example:
        >>> import pandas as pd
        >>> from torch_secorder.plotting import heat_strip
        >>> report = pd.DataFrame({"fisher_mean": [0.1, 1e-3]}, index=["first", "second"])
        >>> [label.get_text() for label in heat_strip(report).get_xticklabels()]
        ['first', 'second']
    """
    check_numbers(report, column)
    names = short_names(report.index)
    ax = axes_of(ax, height=2 + 0.07 * max(map(len, names)), width=max(5.0, min(14.0, 0.3 * len(report) + 1.5)))
    values = [float(v) for v in report[column]]
    seen = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    if not seen:
        raise ArgumentError(f"{column} has no {'positive ' if log else ''}number to draw")
    low, high = min(seen), max(seen)
    scale = matplotlib("colors")
    norm = (
        scale.LogNorm(low, high if high > low else 2 * low)
        if log
        else scale.Normalize(low, high if high > low else low + 1)
    )
    cells = [[v if math.isfinite(v) and (v > 0 or not log) else math.nan for v in values]]
    colors = matplotlib("cm").viridis.with_extremes(bad="#cccccc")
    image = ax.imshow(cells, aspect="auto", cmap=colors, norm=norm, interpolation="nearest")
    ax.set_yticks([])
    step = math.ceil(len(names) / MOST_NAMES)
    ax.set_xticks(range(0, len(names), step), names[::step], rotation=90, fontsize="small")
    ax.spines[:].set_visible(False)
    ax.set_title(label_of(column, report), loc="left", fontsize="medium")
    ax.figure.colorbar(image, ax=ax, pad=0.02, fraction=0.05)
    return ax


def time_series(
    reports: Mapping[Any, pd.DataFrame],
    column: str = "fisher_trace",
    *,
    rows: Sequence[str] | int = 6,
    log: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """How a column changes over training: a line for each row, over the steps at which reports were made.

    Args:
        reports: step -> the report of that step, by parameter or by group.
        column: the column to draw; ``fisher_trace`` gets a band of one standard error.
        rows: the names of the rows to draw, or how many, beginning with the largest in the last report.
        log: whether the axis is logarithmic.
        ax: where to draw.

    Raises:
        ArgumentError: without reports, or if one lacks the column or the rows.

    Example:
        >>> import pandas as pd
        >>> from torch_secorder.plotting import time_series
        >>> def at(step):
        ...     return pd.DataFrame({"fisher_trace": [1.0 + step]}, index=["first"])
        >>> reports = {step: at(step) for step in (0, 100)}
        >>> [line.get_label() for line in time_series(reports).lines]
        ['first']
    """
    if not isinstance(reports, Mapping) or not reports:
        raise ArgumentError("there is no report to draw: pass a mapping from steps to reports")
    for report in reports.values():
        check_numbers(report, column)
    steps = sorted(reports)
    last = reports[steps[-1]]
    names = list(range_of_largest(last[column], rows) if isinstance(rows, int) else rows)
    if missing := [name for name in names if any(name not in report.index for report in reports.values())]:
        raise ArgumentError(f"not every report has a row {missing[0]!r}")
    ax = axes_of(ax, height=3.8, width=7.0)
    lines: list[Any] = []
    for number, name in enumerate(names):
        color = COLORS[number % 6]
        values = [float(reports[step].loc[name, column]) for step in steps]
        style: dict[str, Any] = {
            "marker": MARKERS[number % 6],
            "markersize": 3.5,
            "lw": 1.5,
            "ls": "-" if number < 6 else "--",
        }
        lines += ax.plot(steps, values, color=color, label=str(name), **style)
        if column == "fisher_trace" and "fisher_trace_stderr" in last.columns:
            errors = [float(reports[step].loc[name, "fisher_trace_stderr"]) for step in steps]
            # On a logarithmic axis a band must not reach zero.
            below = [max(v - e, v / 10) if log else v - e for v, e in zip(values, errors, strict=True)]
            ax.fill_between(
                steps, below, [v + e for v, e in zip(values, errors, strict=True)], color=color, alpha=0.15, lw=0
            )
    if log:
        ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel(label_of(column, last))
    # The names are given here, since matplotlib leaves out labels that begin with an underscore, as many modules' names do.
    ax.legend(lines, list(map(str, names)), frameon=False, loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def range_of_largest(values: Any, count: int) -> list[Any]:
    """The labels of the ``count`` largest values, largest first."""
    return list(values.sort_values(ascending=False).index[: max(1, count)])
