"""The changes from one report to another."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

from torch_secorder.cli.failures import CommandError
from torch_secorder.results.text import aligned, number

Row = dict[str, Any]
COLUMNS = ("before", "after", "ratio", "z", "note")


def changes(before: Path, after: Path) -> tuple[str, list[Row], list[float]]:
    """The rows' kind, a row for each name in either of two CSV files, and both totals.

    Raises:
        CommandError: if a file is no report, or the two can't be compared.
    """
    (index, one), (other, two) = _read(before), _read(after)
    if index != other:
        raise CommandError(f"{before} has a row per {index}, {after} a row per {other}: use the same --by")
    _check_comparable((before, after), one, two)
    rows = [_change(name, one.get(name), two.get(name)) for name in dict.fromkeys([*one, *two])]
    return index, rows, [sum(row["fisher_trace"] for row in side.values()) for side in (one, two)]


def as_text(index: str, rows: list[Row], totals: list[float]) -> str:
    """The comparison for a terminal."""
    header = [index, "before", "after", "ratio", "change / stderr", ""]
    table = [[_cell(row, key) for key in ("name", *COLUMNS)] for row in rows]
    ratio = number(_ratio(*totals))
    factor = {"": "", "1": ", unchanged"}.get(ratio, f", {ratio} times")
    whole = f"Fisher trace of the model: {number(totals[0])} before, {number(totals[1])} after{factor}"
    return f"{aligned([header, *table])}\n\n{whole}"


def as_csv(index: str, rows: list[Row]) -> bytes:
    """The comparison for a file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([index, *COLUMNS])
    writer.writerows([["" if _is_nan(value) else value for value in row.values()] for row in rows])
    return text.getvalue().encode()


def _read(path: Path) -> tuple[str, dict[str, Row]]:
    """The rows' kind, and the rows by name."""
    if path.suffix == ".safetensors":
        raise CommandError(
            f"{path}: compare reads what --csv wrote; statistics that --save wrote go to torch-secorder merge"
        )
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            lines, columns = list(reader), list(reader.fieldnames or [])
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise CommandError(f"{path} is no CSV file: {error}") from error
    needed = ("fisher_trace", "fisher_trace_stderr", "reduction", "fisher", "n_samples")
    if missing := [name for name in needed if name not in columns]:
        raise CommandError(
            f"{path} has no column {', '.join(missing)}: write it with torch-secorder report --csv, or with "
            "report.assign(**report.attrs).to_csv(path)"
        )
    if not lines:
        raise CommandError(f"{path} has no row")
    rows: dict[str, Row] = {}
    for place, line in enumerate(lines, start=2):
        try:
            numbers = {key: float(line[key] or "nan") for key in ("fisher_trace", "fisher_trace_stderr")}
        except (TypeError, ValueError):
            raise CommandError(f"{path}, line {place}: fisher_trace or its stderr is not a number") from None
        rows[line[columns[0]]] = {**line, **numbers}
    return columns[0], rows


def _check_comparable(files: tuple[Path, Path], before: dict[str, Row], after: dict[str, Row]) -> None:
    a, b = next(iter(before.values())), next(iter(after.values()))
    for key in ("reduction", "fisher"):
        if a[key] != b[key]:
            raise CommandError(
                f"{files[0]} has {key} {a[key]!r} and {files[1]} {b[key]!r}, which are not comparable: make both "
                f"reports with the same --{key}"
            )
    if a["reduction"] == "sum" and a["n_samples"] != b["n_samples"]:
        raise CommandError(
            f"the reports are sums over {a['n_samples']} and {b['n_samples']} samples, which are not comparable: make them "
            "with --reduction mean and a loss that averages, or over as many samples"
        )
    if not set(before) & set(after):
        raise CommandError(f"{files[0]} and {files[1]} have no {next(iter(a))} in common: they are of different models")


def _change(name: str, before: Row | None, after: Row | None) -> Row:
    row: Row = {"name": name, "before": math.nan, "after": math.nan, "ratio": math.nan, "z": math.nan, "note": ""}
    if before is not None:
        row["before"] = before["fisher_trace"]
    if after is not None:
        row["after"] = after["fisher_trace"]
    if before is None or after is None:
        return row | {"note": "only before" if after is None else "only after"}
    error = math.hypot(before["fisher_trace_stderr"], after["fisher_trace_stderr"])
    difference = row["after"] - row["before"]
    return row | {
        "ratio": _ratio(row["before"], row["after"]),
        "z": difference / error if error > 0 else math.nan,
        "note": "fell" if difference < -2 * error else "rose" if difference > 2 * error else "",
    }


def _ratio(before: float, after: float) -> float:
    return after / before if before else math.nan


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _cell(row: Row, key: str) -> str:
    value = row[key]
    if isinstance(value, str):
        return value or ("(model)" if key == "name" else "")
    return "" if math.isnan(value) else f"{value:+.1f}" if key == "z" else number(value)
