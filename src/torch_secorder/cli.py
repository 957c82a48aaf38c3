"""The command line: ``torch-secorder report SETUP.py:build`` and ``torch-secorder compare a.csv b.csv``."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import json
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torch_secorder.errors import CurvatureError
from torch_secorder.loop import fisher_report
from torch_secorder.plotting import bars, styled

if TYPE_CHECKING:
    import pandas as pd

FORMATS = ("csv", "json", "html", "png")
MOST_BARS = 100
DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
DESCRIPTION = "How much curvature (Fisher information) every parameter of a PyTorch model carries."
EXIT_CODES = (
    "Exit codes: 0 done; 1 refused or failed, with the reason on stderr and no file written; 2 a wrong command line; "
    "130 interrupted."
)


class CommandError(Exception):
    """What goes to stderr in place of a traceback."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit code: 0 done, 1 refused or failed, 2 a wrong command line, 130 interrupted.

    Args:
        arguments: of the command line; by default those of the process.

    Example:
        >>> from torch_secorder.cli import main
        >>> main(["compare", "before.csv", "after.csv"])  # where there are no such files; the reason goes to stderr
        1
    """
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as stop:  # argparse has said what is wrong, or what was asked for
        return int(stop.code or DONE)
    try:
        options.run(options)
    except (CommandError, CurvatureError) as error:
        kind = "" if isinstance(error, CommandError) else f"{type(error).__name__}: "
        print(f"torch-secorder: {kind}{error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("torch-secorder: interrupted; no file was written", file=sys.stderr)
        return INTERRUPTED
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="torch-secorder", description=DESCRIPTION, epilog=EXIT_CODES)
    parser.add_argument("--version", action="version", version=f"torch-secorder {version('torch-secorder')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    report = commands.add_parser(
        "report",
        help="the Fisher trace of every parameter of a model",
        description="Runs a function of yours that returns (model, loss, data), and prints how much Fisher information every "
        "parameter of the model carries over the data.",
        epilog=EXIT_CODES,
    )
    report.set_defaults(run=_report)
    report.add_argument(
        "setup",
        type=_setup,
        metavar="SETUP.py:FUNCTION",
        help="takes no argument and returns a torch.nn.Module, a loss(outputs, targets) (or None, where --fisher needs "
        "none), and an iterable of (inputs, targets), such as a DataLoader",
    )
    report.add_argument("--by", choices=("parameter", "module", "type", "model"), default="parameter", help="rows")
    report.add_argument(
        "--fisher",
        choices=("empirical", "exact", "sampled", "observed"),
        default="empirical",
        help="whose labels: the data's, by the loss (the default); the model's own, integrated out or sampled; or the "
        "data's, by the likelihood",
    )
    report.add_argument("--loss-type", default="nll", help='likelihood where --fisher is not empirical (default "nll")')
    report.add_argument(
        "--num-samples", type=_positive, metavar="K", help="backward passes per batch of --fisher sampled"
    )
    report.add_argument("--max-batches", type=_positive, metavar="K", help="stop after so many batches")
    report.add_argument("--max-passes", type=_positive, metavar="K", default=10_000, help="the most per batch")
    report.add_argument("--reduction", choices=("mean", "sum"), help="by default as the loss does")
    report.add_argument("--parameters", choices=("trainable", "all"), default="trainable")
    report.add_argument("--seed", type=int, metavar="N", help="for torch.manual_seed, before SETUP.py is run")
    report.add_argument(
        "--no-verify", dest="verify", action="store_false", help="don't check a sample by plain autograd"
    )
    report.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=sys.stderr.isatty(),
        help="a progress bar on stderr, with tqdm (by default on a terminal)",
    )
    for form in FORMATS:
        report.add_argument(f"--{form}", type=Path, metavar="FILE", help=f"also write the table as {form.upper()}")

    compare = commands.add_parser(
        "compare",
        help="what changed from one report to another",
        description="Shows what changed between two reports that --csv wrote: the ratio of the traces, and their difference in "
        "standard errors, taking the two sets of samples for independent.",
        epilog=EXIT_CODES,
    )
    compare.set_defaults(run=_compare)
    compare.add_argument("before", type=Path, metavar="A.csv")
    compare.add_argument("after", type=Path, metavar="B.csv")
    compare.add_argument("--csv", type=Path, metavar="FILE", help="also write the comparison as CSV")
    return parser


def _setup(value: str) -> tuple[Path, str]:
    path, colon, function = value.rpartition(":")
    if not colon or not path.endswith(".py") or not function.isidentifier():
        raise argparse.ArgumentTypeError(f"{value!r} is not of the form SETUP.py:FUNCTION")
    return Path(path), function


def _positive(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a positive integer")
    return int(value)


# ---------------------------------------------------------------------------------------------------------- report


def _report(options: argparse.Namespace) -> None:
    targets = {form: getattr(options, form) for form in FORMATS if getattr(options, form) is not None}
    _check_targets(targets.values())
    if "png" in targets and importlib.util.find_spec("matplotlib") is None:
        raise CommandError("--png needs matplotlib, which is not installed: pip install 'torch-secorder[plot]'")
    if options.seed is not None:
        torch.manual_seed(options.seed)
    with _imported(*options.setup) as build:
        model, loss, data = _built(build, options.setup)
        try:
            report = fisher_report(
                model,
                loss,
                data,
                fisher=options.fisher,
                num_samples=options.num_samples,
                loss_type=options.loss_type,
                max_batches=options.max_batches,
                progress=options.progress,
                verify=options.verify,
                by={"parameter": None, "model": lambda name: "model"}.get(options.by, options.by),
                reduction=options.reduction,
                parameters=options.parameters,
                max_passes=options.max_passes,
            )
        except CurvatureError:
            raise
        except Exception as error:  # of the user's model, loss or data
            raise CommandError(
                f"the model, the loss or the data of {_name(options.setup)} failed\n{_told(error)}"
            ) from error
    print(_text(report))
    writers: dict[str, Callable[[pd.DataFrame], bytes]] = {"csv": _csv, "json": _json, "html": _html, "png": _png}
    _write({path: writers[form](report) for form, path in targets.items()})


@contextmanager
def _imported(path: Path, function: str) -> Iterator[Callable[[], Any]]:
    """The user's function, whose file may import its neighbours."""
    if not path.is_file():
        raise CommandError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"_setup_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    sys.modules[module.__name__] = module
    try:
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise CommandError(f"{path} does not import\n{_told(error)}") from error
        build = getattr(module, function, None)
        if not callable(build):
            here = [
                n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__
            ]
            raise CommandError(f"{path} has no function {function}; it defines {', '.join(here) or 'none'}")
        yield build
    finally:
        del sys.modules[module.__name__]
        if folder in sys.path:
            sys.path.remove(folder)


def _built(build: Callable[[], Any], setup: tuple[Path, str]) -> tuple[Any, Any, Any]:
    try:
        built = build()
    except (Exception, SystemExit) as error:
        raise CommandError(f"{_name(setup)}() failed\n{_told(error)}") from error
    if not isinstance(built, (tuple, list)) or len(built) != 3:
        what = f"{len(built)} values" if isinstance(built, (tuple, list)) else type(built).__name__
        raise CommandError(f"{_name(setup)}() must return (model, loss, data), not {what}")
    if not isinstance(built[0], torch.nn.Module):
        raise CommandError(f"{_name(setup)}() must return a torch.nn.Module first, not {type(built[0]).__name__}")
    return built[0], built[1], built[2]


def _name(setup: tuple[Path, str]) -> str:
    return f"{setup[0]}:{setup[1]}"


def _told(error: BaseException) -> str:
    """The traceback, from the user's own file on."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(("<frozen", os.path.dirname(__file__)))]
    lines = traceback.format_list(own) + traceback.format_exception_only(error)
    return "".join(lines).rstrip()


# ------------------------------------------------------------------------------------------------------------ text


def _text(report: pd.DataFrame) -> str:
    """The table for a terminal: the numbers that decide, and a bar for the share."""
    largest = report["fisher_trace_share"].max()
    header = [str(report.index.name), "numel", "fisher_trace", "± stderr", "per weight", "share", ""]
    rows = [
        [
            str(name) or "(model)",
            f"{row['numel']:,}",
            _number(row["fisher_trace"]),
            _number(row["fisher_trace_stderr"]),
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
    return f"{_aligned([header, *rows])}\n\nFisher trace of the model: {_number(total)} ({kind})"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = row
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others[:-1], widths[1:-1], strict=True))]
        lines.append("  ".join([*cells, others[-1]]).rstrip())
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------- files


def _csv(report: pd.DataFrame) -> bytes:
    return report.assign(**{str(name): value for name, value in report.attrs.items()}).to_csv().encode()


def _json(report: pd.DataFrame) -> bytes:
    rows = [{key: _plain(value) for key, value in row.items()} for row in report.reset_index().to_dict("records")]
    return (json.dumps(report.attrs | {"rows": rows}, indent=1, allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _html(report: pd.DataFrame) -> bytes:
    facts = report.attrs
    caption = f"{facts['fisher']} Fisher, {facts['reduction']} over {facts['n_samples']:,} samples"
    style = styled(report).format_index(escape="html").set_caption(caption)
    return str(style.to_html(doctype_html=True)).encode()


def _png(report: pd.DataFrame) -> bytes:
    from matplotlib.figure import Figure

    rows = min(len(report), MOST_BARS)
    figure = Figure(figsize=(8, 0.28 * rows + 1.4), layout="constrained")
    axes = bars(report, top=rows, ax=figure.subplots())
    if rows < len(report):
        axes.set_title(f"The {rows} largest of {len(report):,} rows", loc="left", fontsize="medium")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _check_targets(paths: Any) -> None:
    """Refuse before the work what can't be written after it."""
    for path in paths:
        if path.is_dir() or not path.absolute().parent.is_dir():
            reason = "is a folder" if path.is_dir() else f"is in {path.absolute().parent.name}/, which does not exist"
            raise CommandError(f"cannot write {path}: it {reason}")


def _write(contents: Mapping[Path, bytes]) -> None:
    """Write whole files or none: each is complete beside its place before the first is moved there."""
    ready: list[tuple[str, Path]] = []
    try:
        for path, content in contents.items():
            with tempfile.NamedTemporaryFile(dir=path.absolute().parent, prefix=".", delete=False) as file:
                ready.append((file.name, path))
                file.write(content)
            os.chmod(file.name, 0o666 & ~_umask())
        for name, path in ready:
            os.replace(name, path)
    except OSError as error:
        raise CommandError(f"cannot write {error.filename or 'the files'}: {error.strerror}") from error
    finally:
        for name, _ in ready:
            Path(name).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --------------------------------------------------------------------------------------------------------- compare


def _compare(options: argparse.Namespace) -> None:
    if options.csv is not None:
        _check_targets([options.csv])
    (index, before), (other, after) = _read(options.before), _read(options.after)
    if index != other:
        raise CommandError(
            f"{options.before} has a row per {index}, {options.after} a row per {other}: use the same --by"
        )
    _check_comparable(options, before, after)
    names = list(dict.fromkeys([*before, *after]))
    rows = [_change(name, before.get(name), after.get(name)) for name in names]
    whole = [sum(row["fisher_trace"] for row in side.values()) for side in (before, after)]
    total = _ratio(*whole)
    header = [index, "before", "after", "ratio", "change / stderr", ""]
    table = [[_cell(row, key) for key in ("name", "before", "after", "ratio", "z", "note")] for row in rows]
    print(_aligned([header, *table]))
    print(f"\nFisher trace of the model: {_number(whole[0])} before, {_number(whole[1])} after, {_number(total)} times")
    if options.csv is not None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([index, "before", "after", "ratio", "z", "note"])
        writer.writerows([["" if _is_nan(value) else value for value in row.values()] for row in rows])
        _write({options.csv: text.getvalue().encode()})


Row = dict[str, Any]


def _read(path: Path) -> tuple[str, dict[str, Row]]:
    """What the rows are, and each of them by name."""
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
    for number, line in enumerate(lines, start=2):
        try:
            numbers = {key: float(line[key] or "nan") for key in ("fisher_trace", "fisher_trace_stderr")}
        except (TypeError, ValueError):
            raise CommandError(f"{path}, line {number}: fisher_trace or its stderr is not a number") from None
        rows[line[columns[0]]] = {**line, **numbers}
    return columns[0], rows


def _check_comparable(options: argparse.Namespace, before: dict[str, Row], after: dict[str, Row]) -> None:
    a, b = next(iter(before.values())), next(iter(after.values()))
    for key in ("reduction", "fisher"):
        if a[key] != b[key]:
            raise CommandError(
                f"{options.before} has {key} {a[key]!r} and {options.after} {b[key]!r}, which are not comparable: make both "
                f"reports with the same --{key}"
            )
    if a["reduction"] == "sum" and a["n_samples"] != b["n_samples"]:
        raise CommandError(
            f"the reports are sums over {a['n_samples']} and {b['n_samples']} samples, which are not comparable: make them "
            "with --reduction mean and a loss that averages, or over as many samples"
        )
    if not set(before) & set(after):
        raise CommandError(
            f"{options.before} and {options.after} have no {next(iter(a))} in common: they are of different models"
        )


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
    return "" if math.isnan(value) else f"{value:+.1f}" if key == "z" else _number(value)


if __name__ == "__main__":
    sys.exit(main())
