"""Tables for a terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def as_text(report: pd.DataFrame) -> str:
    """The table for a terminal: the numbers that decide, and a bar for the share."""
    largest = report["fisher_trace_share"].max()
    header = [str(report.index.name), "numel", "fisher_trace", "± stderr", "per weight", "share", ""]
    rows = [
        [
            str(name) or "(model)",
            f"{row['numel']:,}",
            number(row["fisher_trace"]),
            number(row["fisher_trace_stderr"]),
            f"{row['fisher_mean']:.1e}",
            f"{row['fisher_trace_share']:.1%}",
            "█" * round(10 * row["fisher_trace_share"] / largest) if largest > 0 else "",
        ]
        for name, row in zip(report.index, report.to_dict("records"), strict=True)
    ]
    facts = report.attrs
    total = float(report["fisher_trace"].sum())
    passes = f" in {facts['n_passes']:,} batches" if facts["n_passes"] > 1 else ""
    kind = f"{facts['fisher']} Fisher, {facts['reduction']} over {facts['n_samples']:,} samples{passes}"
    if "rtol" in facts:
        what = "the total" if facts["rtol_of"] == "total" else "every row"
        end = "stopped" if facts["reached_rtol"] else "the data ended"
        kind += (
            f"; {end} at a standard error of {facts['relative_stderr']:.1%} of {what}, {facts['rtol']:.1%} asked for"
        )
    return f"{aligned([header, *rows])}\n\nFisher trace of the model: {number(total)} ({kind})"


def checked_as_text(checked: pd.DataFrame) -> str:
    """What :func:`torch_secorder.testing.check` found, for a terminal."""
    header = ["parameter", "library", "loop", "relative error", "verdict"]
    rows = [
        [str(name), number(row["library"]), number(row["loop"]), f"{row['relative_error']:.1e}", row["verdict"]]
        for name, row in zip(checked.index, checked.to_dict("records"), strict=True)
    ]
    facts = checked.attrs
    verdict = "the library and the loop agree" if facts["equal"] else "THE LIBRARY AND THE LOOP DIFFER"
    mode = ", in eval mode" if facts["mode"] == "eval" else ""
    kind = f"empirical Fisher, {facts['reduction']} over {facts['n_samples']} samples{mode}"
    return f"{aligned([header, *rows])}\n\n{verdict} ({kind})"


def number(value: float) -> str:
    """Four digits, or nothing."""
    return "" if math.isnan(value) else f"{value:.4g}"


def aligned(rows: list[list[str]]) -> str:
    """Columns, the first of them flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = row
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others[:-1], widths[1:-1], strict=True))]
        lines.append("  ".join([*cells, others[-1]]).rstrip())
    return "\n".join(lines)
