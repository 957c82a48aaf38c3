"""The parts that all pictures share: Axes, names and labels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch_secorder.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, GREY = "#4c78a8", "#888888"
COLORS = ("#4c78a8", "#e1812c", "#3a923a", "#c03d3e", "#9372b2", "#845b53")
MARKERS = "os^Dvp"
MOST_NAMES, LONGEST = 60, 40  # names on an axis; characters of a name


def axes_of(ax: Axes | None, *, height: float, width: float = 7.5) -> Axes:
    """The given Axes, or those of a new figure of this size in inches."""
    if ax is not None:
        return ax
    figure: Figure = matplotlib("pyplot").figure(figsize=(width, height), layout="constrained")
    return figure.subplots()


def matplotlib(module: str) -> Any:
    """A module of matplotlib.

    Raises:
        ImportError: with the command that installs it, if it is not there.
    """
    try:
        return import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'torch-secorder[plot]'") from error


def check_numbers(report: Any, column: str) -> None:
    """Raise unless the report has this column, with numbers and at least one row.

    Raises:
        ArgumentError: saying what is missing.
    """
    if column not in getattr(report, "columns", ()) or not len(report):
        raise ArgumentError(f"expected a report with the column {column!r} and one row at least")
    if report[column].dtype.kind not in "iuf":
        raise ArgumentError(f"the column {column!r} has no numbers to draw")


def name_rows(ax: Axes, frame: Any) -> None:
    """Names along the vertical axis, from the top down."""
    names = short_names(frame.index)
    ax.set_yticks(range(len(names)), names, fontsize="small")
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.spines[["top", "right"]].set_visible(False)


def short_names(index: Iterable[Any]) -> list[str]:
    """Names short enough to leave room for the picture; long ones lose the beginning that all share."""
    names = [str(name) for name in index]
    if len(names) > 1 and max(map(len, names)) > LONGEST:
        first, last = min(names), max(names)
        same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        common = first[:same].rpartition(".")[0]
        names = [f"…{name[len(common) :]}" if common else name for name in names]
    return [f"…{name[1 - LONGEST :]}" if len(name) > LONGEST else name or "(model)" for name in names]


def label_of(column: str, report: Any, errors: bool = False) -> str:
    """The label of an axis that shows a column."""
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


def settings(table: Any) -> list[Any]:
    """The columns of a sensitivity that are a number of bits or a share; as text if the table was read from a file."""
    return [c for c in getattr(table, "columns", ()) if isinstance(c, (int, float)) or str(c).isdigit()]


def setting(column: Any) -> str:
    """A number of bits, or a share in percent."""
    return f"{column:.0%}" if isinstance(column, float) else str(column)


def percent(share: float) -> str:
    """A share in percent; "< 0.1%" if it is tiny, and nothing for NaN."""
    return "" if math.isnan(share) else "< 0.1%" if 0 < share < 0.0005 else f"{share:.1%}"
