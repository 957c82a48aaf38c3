"""Reports as text for a terminal and as HTML for a notebook."""

from __future__ import annotations

import html
import math
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

BAR = 10  # characters of the longest bar
SHORTEST_NAME = 12  # names are never cut below this


@dataclass
class _Column:
    """A column of text. If two columns do not both fit, the one with the lower ``rank`` is left out."""

    header: str
    cells: list[str]
    rank: int = 100
    left: bool = False

    @property
    def width(self) -> int:
        return max(map(len, [self.header, *self.cells]))

    def line(self, row: int) -> str:
        cell = self.header if row < 0 else self.cells[row]
        return cell.ljust(self.width) if self.left else cell.rjust(self.width)


def summary(report: pd.DataFrame, width: int | None = None) -> str:
    """A report as text: each row's trace, its standard error, its share as a bar, and the total below.

    Args:
        report: a table from :func:`~torch_secorder.fisher_report` or ``monitor.report``, by parameter or grouped.
        width: the width of the text in characters; by default that of the terminal, or 100 if there is none. If the table is
            wider, columns are left out: first the layers' types, then the shapes, the bars, the traces per weight and
            the numbers of weights. After that, names lose the beginning and the end that they share, and then their middles, as
            long as they stay different.

    Example:
        >>> import torch
        >>> from torch_secorder import fisher_report
        >>> from torch_secorder.results.text import summary
        >>> inputs, targets = torch.eye(4), torch.tensor([0, 1, 0, 1])
        >>> model = torch.nn.Linear(4, 2)
        >>> model.load_state_dict({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)})
        <All keys matched successfully>
        >>> loss_fn = torch.nn.CrossEntropyLoss()
        >>> report = fisher_report(model, loss_fn, (inputs, targets), progress=False)
        >>> print(summary(report, width=60))
        parameter  numel  fisher_trace  ± stderr  per weight  share
        weight         8        0.5000    0.0000     6.2e-02  50.0%
        bias           2        0.5000    0.0000     2.5e-01  50.0%
        <BLANKLINE>
        Fisher trace of the model: 1 ± 0
        empirical Fisher, mean over 4 samples
    """
    columns = _fitting(_columns(report), width or shutil.get_terminal_size((100, 24)).columns)
    lines = ["  ".join(column.line(row) for column in columns).rstrip() for row in range(-1, len(report))]
    return "\n".join([*lines, "", *_facts(report)])


def as_html(report: pd.DataFrame) -> str:
    """A report as HTML for a notebook, with the same numbers and the total below."""
    columns = [column for column in _columns(report) if column.header]
    head = "".join(f"<th>{html.escape(column.header)}</th>" for column in columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(column.cells[row])}</td>" for column in columns) + "</tr>"
        for row in range(len(report))
    )
    facts = "<br>".join(map(html.escape, _facts(report)))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table><p>{facts}</p>"


def number(value: float) -> str:
    """Four digits, or nothing for NaN."""
    return "" if math.isnan(value) else f"{value:.4g}"


def aligned(rows: list[list[str]]) -> str:
    """Rows as aligned columns, the first and the last of them flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = row
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others[:-1], widths[1:-1], strict=True))]
        lines.append("  ".join([*cells, others[-1]]).rstrip())
    return "\n".join(lines)


def _columns(report: pd.DataFrame) -> list[_Column]:
    """All columns of the table, before any is left out."""
    share = [0.0 if math.isnan(value) else float(value) for value in report["fisher_trace_share"]]
    largest = max(share, default=0.0)
    bars = ["█" * round(BAR * max(value, 0.0) / largest) if largest > 0 else "" for value in share]
    columns = [_Column(str(report.index.name), [str(name) or "(model)" for name in report.index], left=True)]
    if "shape" in report:
        columns += [
            _Column("layer", list(report["module_type"]), 1),
            _Column("shape", ["x".join(map(str, shape)) for shape in report["shape"]], 2),
        ]
    return [
        *columns,
        _Column("numel", [f"{numel:,}" for numel in report["numel"]], 5),
        _Column("fisher_trace", _of_one_precision(report["fisher_trace"])),
        _Column("± stderr", _errors(report["fisher_trace_stderr"], report["fisher_trace"])),
        _Column("per weight", ["" if math.isnan(mean) else f"{mean:.1e}" for mean in report["fisher_mean"]], 4),
        _Column("share", ["" if math.isnan(part) else f"{part:.1%}" for part in report["fisher_trace_share"]]),
        _Column("", bars, 3, left=True),
    ]


def _fitting(columns: list[_Column], width: int) -> list[_Column]:
    """The columns that fit, with shorter names if no other column can be left out."""
    while _width(columns) > width and len(columns) > 4:
        columns = [column for column in columns if column.rank != min(other.rank for other in columns)]
    names = columns[0]
    room = max(SHORTEST_NAME, names.width - max(_width(columns) - width, 0))
    names.cells = _shortened(names.cells, room)
    return columns


def _width(columns: list[_Column]) -> int:
    return sum(column.width for column in columns) + 2 * (len(columns) - 1)


def _shortened(names: list[str], width: int) -> list[str]:
    """Names of at most ``width`` characters if they stay different: what all share is cut first, then the middles."""
    for shorter in (names, _without_common_start(names), _without_common_end(_without_common_start(names))):
        if max(map(len, shorter), default=0) <= width:
            return shorter
    names = shorter
    tails = sorted(range(1, width - 1), key=lambda tail: abs(tail - (width - 1) * 2 // 3))
    for tail in tails:
        cut = [_cut(name, width, tail) for name in names]
        if len(set(cut)) == len(set(names)):
            return cut
    return _shortened(names, width + 1)


def _without_common_start(names: list[str]) -> list[str]:
    """Names of several rows without the modules that all of them begin with."""
    split = [name.split(".") for name in names]
    shared = 0
    while all(len(parts) > shared + 1 and parts[shared] == split[0][shared] for parts in split):
        shared += 1
    return names if not shared or len(names) == 1 else ["…" + ".".join(parts[shared:]) for parts in split]


def _without_common_end(names: list[str]) -> list[str]:
    turned = [".".join(reversed(name.split("."))) for name in names]
    shorter = _without_common_start(turned)
    if shorter is turned:
        return names
    return [".".join(reversed(name[1:].split("."))) + "…" for name in shorter]


def _cut(name: str, width: int, tail: int) -> str:
    """A name; if it is longer than ``width``, its middle is left out, with ``tail`` characters after the gap."""
    return name if len(name) <= width else f"{name[: width - 1 - tail]}…{name[-tail:]}"


def _errors(errors: Any, traces: Any) -> list[str]:
    """Standard errors with the decimals of their traces, or all as powers of ten if one of them is too small for that."""
    cells = _of_one_precision(errors, traces)
    if any("e" in cell for cell in cells):
        return ["" if math.isnan(error) else f"{error:.1e}" for error in errors]
    return cells


def _of_one_precision(values: Any, scale: Any = None) -> list[str]:
    """Numbers with the same number of decimals, so many that the largest of ``scale`` has four digits."""
    known = [abs(value) for value in (values if scale is None else scale) if math.isfinite(value)]
    largest = max(known, default=0.0)
    decimals = 4 if largest == 0 else 3 - math.floor(math.log10(largest))
    if not -4 <= decimals <= 8:
        return ["" if math.isnan(value) else f"{value:.3e}" for value in values]
    return [_decimal(float(value), max(decimals, 0)) for value in values]


def _decimal(value: float, decimals: int) -> str:
    if math.isnan(value):
        return ""
    lost = value != 0 and abs(value) < 0.5 * 10**-decimals
    return f"{value:.1e}" if lost else f"{value:,.{decimals}f}"


def _facts(report: pd.DataFrame) -> list[str]:
    """The total with its standard error, and a line that says what it is the total of."""
    facts = report.attrs
    total = f"Fisher trace of the model: {number(float(report['fisher_trace'].sum()))}"
    error = facts.get("total_stderr", math.nan)
    if not math.isnan(error):
        total += f" ± {error:.3g}"
    batches = f" in {facts['n_passes']:,} batches" if facts["n_passes"] > 1 else ""
    told = [f"{facts['fisher']} Fisher, {facts['reduction']} over {_counted(facts['n_samples'], 'sample')}{batches}"]
    if facts.get("skipped_passes"):
        told += [_counted(facts["skipped_passes"], "refused pass", "refused passes") + " left out"]
    if facts.get("n_skipped"):
        told += [_counted(facts["n_skipped"], "sample") + " with non-finite gradients left out"]
    if "rtol" in facts:
        what = "the total" if facts["rtol_of"] == "total" else "every row"
        end = "stopped" if facts["reached_rtol"] else "the data ended"
        few = not facts["reached_rtol"] and facts["relative_stderr"] <= facts["rtol"]
        told += [
            f"{end} at a standard error of {facts['relative_stderr']:.1%} of {what}, {facts['rtol']:.1%} asked for"
            + (" (which so few samples do not tell)" if few else "")
        ]
    return [total, ", ".join(told)]


def _counted(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"
