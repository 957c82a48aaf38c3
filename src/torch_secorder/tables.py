"""Tables that are no reports: made from rows, and reports read back from files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

import pandas as pd

from torch_secorder.errors import ArgumentError

ATTRIBUTES = ("reduction", "fisher", "n_samples")
FURTHER_ATTRIBUTES = (  # that not every report has
    *("n_passes", "skipped_passes", "total_stderr", "n_skipped", "mean_inverse_batch_size"),
    *("rtol", "rtol_of", "relative_stderr", "reached_rtol"),
)


def table(rows: Iterable[Mapping[Any, Any]], index: str, columns: Iterable[Any] = (), **attrs: Any) -> pd.DataFrame:
    """A DataFrame from one mapping per row, indexed by one of their keys, with ``attrs``.

    Args:
        rows: the rows; their keys are the columns.
        index: the key that becomes the index.
        columns: the columns of a table without rows.
        attrs: what holds for the whole table.
    """
    found = list(rows)
    frame = (pd.DataFrame(found) if found else pd.DataFrame(columns=[index, *columns])).set_index(index)
    frame.attrs.update(attrs)
    return frame


def read_report(path: str | PathLike[str]) -> pd.DataFrame:
    """A report that was written as CSV, as it was: the index, the shapes and ``attrs``.

    Write it with ``report.assign(**report.attrs).to_csv(path)``: then ``reduction``, ``fisher`` and ``n_samples`` are columns of
    the file, without which nobody knows per how many samples its numbers are.

    Raises:
        ArgumentError: if the file is no such report; it says what is missing.

    Example:
        >>> import tempfile, torch
        >>> from torch_secorder import fisher_report
        >>> from torch_secorder.tables import read_report
        >>> model = torch.nn.Linear(3, 2)
        >>> data = torch.randn(8, 3), None
        >>> report = fisher_report(model, None, data, fisher="exact", progress=False)
        >>> with tempfile.NamedTemporaryFile(suffix=".csv") as file:
        ...     report.assign(**report.attrs).to_csv(file.name)
        ...     again = read_report(file.name)
        >>> again.attrs["fisher"], again.attrs["n_samples"], again.loc["weight", "shape"]
        ('exact', 8, (2, 3))
    """
    empty = {"grad_sq_norm": [""], "fisher_trace_stderr": [""], "fisher_trace_share": [""]}
    try:
        frame = pd.read_csv(path, keep_default_na=False, na_values=empty)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{path} is no CSV file: {error}") from error
    if "parameter" not in frame or len(frame) == 0:
        raise ArgumentError(f"{path} has no column 'parameter': write a report by parameter, with report.to_csv(path)")
    if missing := [name for name in ATTRIBUTES if name not in frame]:
        raise ArgumentError(
            f"{path} lacks {', '.join(missing)}: write it with report.assign(**report.attrs).to_csv(path), which keeps them"
        )
    frame = frame.set_index("parameter")
    kept = [name for name in (*ATTRIBUTES, *FURTHER_ATTRIBUTES) if name in frame]
    for name in kept:
        if frame[name].nunique() != 1:
            raise ArgumentError(f"{path} has several values of {name}: it is not one report")
        value = frame[name].iloc[0]
        frame.attrs[name] = value.item() if hasattr(value, "item") else value
    if "shape" in frame:
        try:
            frame["shape"] = frame["shape"].map(shape_of)
        except ArgumentError as error:
            raise ArgumentError(f"{path}: in the column shape, {error}") from error
    return frame.drop(columns=kept)


def shape_of(value: Any) -> tuple[int, ...]:
    """A shape as a tuple, also where a file made it a string.

    Raises:
        ArgumentError: if it is no shape.
    """
    sides = value.strip("()[] ").split(",") if isinstance(value, str) else value
    try:
        return tuple(int(side) for side in sides if str(side).strip())
    except (TypeError, ValueError):
        raise ArgumentError(f"{value!r} is not a shape") from None
