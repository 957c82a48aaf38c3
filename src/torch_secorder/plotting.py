"""Pictures of reports and of what is decided with them. Needs matplotlib: ``pip install torch-secorder[plot]``.

Every function draws into the Axes that it is given, or into those of a new figure, and returns them.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch_secorder.errors import ArgumentError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from pandas.io.formats.style import Styler

__all__ = [
    "bars",
    "heat_strip",
    "predicted_against_measured",
    "sensitivity_by_bits",
    "styled",
    "time_series",
]

BLUE, GREY = "#4c78a8", "#888888"
COLOURS = ("#4c78a8", "#e1812c", "#3a923a", "#c03d3e", "#9372b2", "#845b53")
MARKERS = "os^Dvp"
MOST_NAMES, LONGEST = 60, 40  # on an axis; characters of a name


def bars(report: pd.DataFrame, column: str = "fisher_trace", *, top: int | None = None, ax: Axes | None = None) -> Axes:
    """Horizontal bars, one per row, with the standard errors of ``fisher_trace`` and each row's share of the sum.

    Args:
        report: a report by parameter, by module, or by anything else.
        column: what the bars are long as.
        top: only so many rows with the longest bars, in the report's order.
        ax: where to draw.

    Raises:
        ArgumentError: if the report lacks the column or has no row.

    Example:
        >>> import torch
        >>> from torch_secorder import fisher_report
        >>> from torch_secorder.plotting import bars
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> report = fisher_report(model, None, (torch.randn(32, 4), None), fisher="exact", progress=False, by="module")
        >>> [label.get_text() for label in bars(report).get_yticklabels()]
        ['0', '2']
    """
    from matplotlib.ticker import PercentFormatter

    _has(report, column)
    if top is not None:
        report = report.loc[sorted(range_of_largest(report[column], top), key=list(report.index).index)]
    ax = _axes(ax, height=0.28 * len(report) + 1.4)
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
        labels = [_percent(share) for share in report["fisher_trace_share"]]
        ax.bar_label(container, labels, padding=5, fontsize="small", color="#444444")
        ax.margins(x=0.12)
    _rows(ax, report)
    ax.set_xlim(left=0)
    ax.set_xlabel(_label(column, report, errors is not None))
    if column == "fisher_trace_share":
        ax.xaxis.set_major_formatter(PercentFormatter(1))
    return ax


def heat_strip(report: pd.DataFrame, column: str = "fisher_mean", *, log: bool = True, ax: Axes | None = None) -> Axes:
    """A strip of colour over the depth of the model: one cell per row, in order.

    Args:
        report: a report.
        column: what the colour stands for; by default the curvature per weight.
        log: whether the colours are logarithmic. Zeros are left grey then.
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
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

    _has(report, column)
    names = _short(report.index)
    ax = _axes(ax, height=2 + 0.07 * max(map(len, names)), width=max(5.0, min(14.0, 0.3 * len(report) + 1.5)))
    values = [float(v) for v in report[column]]
    seen = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    if not seen:
        raise ArgumentError(f"{column} has no {'positive ' if log else ''}number to draw")
    low, high = min(seen), max(seen)
    norm = LogNorm(low, high if high > low else 2 * low) if log else Normalize(low, high if high > low else low + 1)
    cells = [[v if math.isfinite(v) and (v > 0 or not log) else math.nan for v in values]]
    colours = colormaps["viridis"].with_extremes(bad="#cccccc")
    image = ax.imshow(cells, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
    ax.set_yticks([])
    step = math.ceil(len(names) / MOST_NAMES)
    ax.set_xticks(range(0, len(names), step), names[::step], rotation=90, fontsize="small")
    ax.spines[:].set_visible(False)
    ax.set_title(_label(column, report), loc="left", fontsize="medium")
    ax.figure.colorbar(image, ax=ax, pad=0.02, fraction=0.05)
    return ax


def sensitivity_by_bits(
    sensitivity: pd.DataFrame, *, allocation: pd.DataFrame | None = None, ax: Axes | None = None
) -> Axes:
    """The predicted KL divergence of each layer and number of bits (or sparsity), as a table of colours.

    Args:
        sensitivity: what ``quantization_sensitivity`` or ``pruning_sensitivity`` returned.
        allocation: what ``allocate_bits`` returned: a dot marks each layer's choice.
        ax: where to draw.

    Raises:
        ArgumentError: if the table is no sensitivity, or the allocation has other rows.

    Example:
        >>> import pandas as pd
        >>> from torch_secorder.plotting import sensitivity_by_bits
        >>> sensitivity = pd.DataFrame({"numel": [6, 8], 2: [0.1, 0.2], 4: [0.01, 0.05]}, index=["first", "second"])
        >>> [label.get_text() for label in sensitivity_by_bits(sensitivity).get_xticklabels()]
        ['2', '4']
    """
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    widths = _settings(sensitivity)
    if not widths or not len(sensitivity):
        raise ArgumentError("not a sensitivity: pass what quantization_sensitivity() or pruning_sensitivity() returned")
    cells = [[float(v) if v > 0 else math.nan for v in row] for row in sensitivity[widths].to_numpy()]
    seen = [v for row in cells for v in row if not math.isnan(v)] or [1.0]
    ax = _axes(ax, height=max(2.6, 0.22 * len(sensitivity) + 1.5))
    colours = colormaps["viridis"].with_extremes(bad="#cccccc")
    norm = LogNorm(min(seen), max(*seen, min(seen) * 1.01))
    image = ax.imshow(cells, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
    ax.set_xticks(range(len(widths)), [_setting(c) for c in widths])
    ax.set_xlabel("sparsity" if any(isinstance(c, float) for c in widths) else "bits")
    if allocation is not None:
        if list(allocation.index) != list(sensitivity.index):
            raise ArgumentError("the allocation is of other rows than the sensitivity")
        columns = [int(c) for c in widths]
        places = [columns.index(int(b)) for b in allocation["bits"]]
        ax.plot(
            places, range(len(places)), "o", color="white", markeredgecolor="black", markersize=5, label="allocated"
        )
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    _rows(ax, sensitivity)
    ax.spines[:].set_visible(False)
    ax.figure.colorbar(image, ax=ax, label="predicted KL divergence\n(nats per sample)", pad=0.02)
    return ax


def predicted_against_measured(pairs: Mapping[str, tuple[Any, Any]], *, ax: Axes | None = None) -> Axes:
    """Points on logarithmic axes, a colour for each setting, with the diagonal where both agree.

    Args:
        pairs: label -> (predicted, measured), two sequences of equal length. Points that are not positive are left out, and
            their number is said.
        ax: where to draw.

    Raises:
        ArgumentError: for sequences of different lengths, or no positive point.

    Example:
        >>> from torch_secorder.plotting import predicted_against_measured
        >>> ax = predicted_against_measured({"4 bits": ([0.1, 0.2], [0.11, 0.18])})
        >>> ax.get_xscale(), ax.get_xlabel()
        ('log', 'measured KL divergence (nats per sample)')
    """
    if not isinstance(pairs, Mapping):
        raise ArgumentError(f"pass a mapping from labels to pairs of sequences, not a {type(pairs).__name__}")
    drawn: list[float] = []
    left_out = 0
    found = {}
    for label, (predicted, measured) in pairs.items():
        xs, ys = [float(v) for v in measured], [float(v) for v in predicted]
        if len(xs) != len(ys):
            raise ArgumentError(f"{label}: {len(ys)} predictions for {len(xs)} measurements")
        good = [(x, y) for x, y in zip(xs, ys, strict=True) if x > 0 and y > 0 and math.isfinite(x + y)]
        left_out += len(xs) - len(good)
        drawn += [v for point in good for v in point]
        found[label] = good
    if not drawn:
        raise ArgumentError("there is no point with a positive prediction and a positive measurement")
    ax = _axes(ax, height=5.0, width=5.5)
    for number, (label, good) in enumerate(found.items()):
        style: dict[str, Any] = {"marker": MARKERS[number % 6], "color": COLOURS[number % 6]}
        ax.scatter([x for x, _ in good], [y for _, y in good], s=22, alpha=0.75, linewidths=0, label=label, **style)
    low, high = min(drawn) / 1.5, max(drawn) * 1.5
    ax.plot([low, high], [low, high], color=GREY, lw=1, zorder=0, label="equal")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(low, high)
    ax.set_ylim(low, high)
    ax.set_aspect("equal")
    ax.set_xlabel("measured KL divergence (nats per sample)")
    ax.set_ylabel("predicted KL divergence (nats per sample)")
    ax.legend(frameon=False, title=f"{left_out} points not positive" if left_out else None)
    ax.spines[["top", "right"]].set_visible(False)
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
        column: what is drawn, with a band of one standard error where it is ``fisher_trace``.
        rows: which rows, or how many of those that are largest in the last report.
        log: whether the axis is logarithmic.
        ax: where to draw.

    Raises:
        ArgumentError: without reports, or if one lacks the column or the rows.

    Example:
        >>> import pandas as pd
        >>> from torch_secorder.plotting import time_series
        >>> reports = {step: pd.DataFrame({"fisher_trace": [1.0 + step]}, index=["first"]) for step in (0, 100)}
        >>> [line.get_label() for line in time_series(reports).lines]
        ['first']
    """
    if not isinstance(reports, Mapping) or not reports:
        raise ArgumentError("there is no report to draw: pass a mapping from steps to reports")
    for report in reports.values():
        _has(report, column)
    steps = sorted(reports)
    last = reports[steps[-1]]
    names = list(range_of_largest(last[column], rows) if isinstance(rows, int) else rows)
    if missing := [name for name in names if any(name not in report.index for report in reports.values())]:
        raise ArgumentError(f"not every report has a row {missing[0]!r}")
    ax = _axes(ax, height=3.8, width=7.0)
    lines: list[Any] = []
    for number, name in enumerate(names):
        colour = COLOURS[number % 6]
        values = [float(reports[step].loc[name, column]) for step in steps]
        style: dict[str, Any] = {
            "marker": MARKERS[number % 6],
            "markersize": 3.5,
            "lw": 1.5,
            "ls": "-" if number < 6 else "--",
        }
        lines += ax.plot(steps, values, color=colour, label=str(name), **style)
        if column == "fisher_trace" and "fisher_trace_stderr" in last.columns:
            errors = [float(reports[step].loc[name, "fisher_trace_stderr"]) for step in steps]
            # On a logarithmic axis a band must not reach zero.
            below = [max(v - e, v / 10) if log else v - e for v, e in zip(values, errors, strict=True)]
            ax.fill_between(
                steps, below, [v + e for v, e in zip(values, errors, strict=True)], color=colour, alpha=0.15, lw=0
            )
    if log:
        ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel(_label(column, last))
    # Named here, since matplotlib leaves out labels that begin with an underscore, as many modules' names do.
    ax.legend(lines, list(map(str, names)), frameon=False, loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def styled(report: pd.DataFrame) -> Styler:
    """The report for notebooks and web pages: numbers with few digits, shares as bars. ``styled(report).to_html()``.

    Needs jinja2, as pandas' Styler does. Columns without a number are left out.

    Args:
        report: a report by parameter or by group, or a sensitivity.

    Example:
        >>> import pandas as pd
        >>> from torch_secorder.plotting import styled
        >>> report = pd.DataFrame({"numel": [12000], "fisher_trace": [0.123456]}, index=["first"])
        >>> "12,000" in styled(report).to_html(), "0.1235" in styled(report).to_html()
        (True, True)
    """
    if getattr(report, "style", None) is None or not report.columns.is_unique:
        raise ArgumentError(f"expected a report (a DataFrame), not {type(report).__name__}")
    formats: dict[Any, Any] = {}
    for column in report.columns:
        if column in ("numel", "n_parameters"):
            formats[column] = "{:,}"
        elif column == "fisher_trace_share":
            formats[column] = _percent
        elif column == "shape":
            formats[column] = lambda shape: " × ".join(map(str, shape)) if isinstance(shape, tuple) else str(shape)
        elif report[column].dtype.kind == "f":
            formats[column] = "{:.4g}"
    style = report.style.format(formats, na_rep="–", escape="html")
    style = style.format_index(lambda name: html.escape(str(name)) or "(model)")
    style = style.format_index(_setting, axis=1, escape="html")
    if "fisher_trace_share" in report.columns:
        style = style.bar(subset=["fisher_trace_share"], color="#c6d9ec", vmin=0)
    if wide := _settings(report):
        style = style.background_gradient(cmap="Blues", subset=wide, axis=None, gmap=report[wide].map(_magnitude))
    sides: list[Any] = [
        {"selector": "th, td", "props": "text-align: left; white-space: nowrap; padding: 2px 10px; font-weight: normal"}
    ]
    sides += [{"selector": "caption", "props": "text-align: left; padding: 6px 10px"}]
    right = [{"selector": "", "props": "text-align: right; font-variant-numeric: tabular-nums"}]
    numbers: dict[Any, Any] = {column: right for column in report.columns if report[column].dtype.kind in "fi"}
    empty: list[Any] = [column for column in report.columns if report[column].isna().all()]
    return style.set_table_styles(sides).set_table_styles(numbers, overwrite=False).hide(empty, axis="columns")


def range_of_largest(values: Any, count: int) -> list[Any]:
    """The labels of the ``count`` largest values, largest first."""
    return list(values.sort_values(ascending=False).index[: max(1, count)])


def _settings(table: Any) -> list[Any]:
    """The columns of a sensitivity that are a number of bits or a share; in a file, names."""
    return [c for c in getattr(table, "columns", ()) if isinstance(c, (int, float)) or str(c).isdigit()]


def _setting(column: Any) -> str:
    return f"{column:.0%}" if isinstance(column, float) else str(column)


def _percent(share: float) -> str:
    return "" if math.isnan(share) else "< 0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def _magnitude(value: float) -> float:
    return math.log10(value) if value > 0 else -20.0


def _axes(ax: Axes | None, *, height: float, width: float = 7.5) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'torch-secorder[plot]'") from error
    import matplotlib.pyplot as plt

    figure: Figure = plt.figure(figsize=(width, height), layout="constrained")
    return figure.subplots()


def _has(report: Any, column: str) -> None:
    if column not in getattr(report, "columns", ()) or not len(report):
        raise ArgumentError(f"expected a report with the column {column!r} and one row at least")
    if report[column].dtype.kind not in "iuf":
        raise ArgumentError(f"the column {column!r} has no numbers to draw")


def _rows(ax: Axes, frame: Any) -> None:
    names = _short(frame.index)
    ax.set_yticks(range(len(names)), names, fontsize="small")
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.spines[["top", "right"]].set_visible(False)


def _short(index: Iterable[Any]) -> list[str]:
    """Names that leave room for the picture, without what all of them begin with if they are long."""
    names = [str(name) for name in index]
    if len(names) > 1 and max(map(len, names)) > LONGEST:
        first, last = min(names), max(names)
        same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        common = first[:same].rpartition(".")[0]
        names = [f"…{name[len(common) :]}" if common else name for name in names]
    return [f"…{name[1 - LONGEST :]}" if len(name) > LONGEST else name or "(model)" for name in names]


def _label(column: str, report: Any, errors: bool = False) -> str:
    names = {
        "fisher_trace": "Fisher trace",
        "fisher_mean": "Fisher information per weight",
        "grad_sq_norm": "squared norm of the batch gradient",
        "fisher_trace_share": "share of the Fisher trace",
    }
    n = report.attrs.get("n_samples")
    per = {"mean": "mean", "sum": "sum"}.get(report.attrs.get("reduction", ""))
    notes = [f"{per} over {int(n):,} samples"] if n and per and column != "fisher_trace_share" else []
    notes += ["± standard error"] if errors else []
    return names.get(column, column) + (f" ({', '.join(notes)})" if notes else "")
