"""Tables for notebooks and web pages."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING, Any

from torch_secorder.errors import ArgumentError
from torch_secorder.plotting.axes import (
    percent,
    setting,
    settings,
)

if TYPE_CHECKING:
    import pandas as pd
    from pandas.io.formats.style import Styler


def styled(report: pd.DataFrame) -> Styler:
    """The report for notebooks and web pages: numbers with few digits, shares as bars. ``styled(report).to_html()``.

    This needs jinja2, as pandas' Styler does. Columns in which every entry is missing are left out.

    Args:
        report: a report by parameter or by group, or a sensitivity.

    Example:
        >>> import pandas as pd
        >>> from torch_secorder.plotting import styled
        >>> columns = {"numel": [12000], "fisher_trace": [0.123456]}
        >>> report = pd.DataFrame(columns, index=["first"])
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
            formats[column] = percent
        elif column == "shape":
            formats[column] = lambda shape: " × ".join(map(str, shape)) if isinstance(shape, tuple) else str(shape)
        elif report[column].dtype.kind == "f":
            formats[column] = "{:.4g}"
    style = report.style.format(formats, na_rep="–", escape="html")
    style = style.format_index(lambda name: html.escape(str(name)) or "(model)")
    style = style.format_index(setting, axis=1, escape="html")
    if "fisher_trace_share" in report.columns:
        style = style.bar(subset=["fisher_trace_share"], color="#c6d9ec", vmin=0)
    if wide := settings(report):
        style = style.background_gradient(cmap="Blues", subset=wide, axis=None, gmap=report[wide].map(_magnitude))
    sides: list[Any] = [
        {"selector": "th, td", "props": "text-align: left; white-space: nowrap; padding: 2px 10px; font-weight: normal"}
    ]
    sides += [{"selector": "caption", "props": "text-align: left; padding: 6px 10px"}]
    right = [{"selector": "", "props": "text-align: right; font-variant-numeric: tabular-nums"}]
    numbers: dict[Any, Any] = {column: right for column in report.columns if report[column].dtype.kind in "fi"}
    empty: list[Any] = [column for column in report.columns if report[column].isna().all()]
    return style.set_table_styles(sides).set_table_styles(numbers, overwrite=False).hide(empty, axis="columns")


def _magnitude(value: float) -> float:
    return math.log10(value) if value > 0 else -20.0
