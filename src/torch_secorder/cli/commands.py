"""The commands of the command line."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import click
import torch
from torch import nn

from torch_secorder import testing
from torch_secorder.approximations.batches import batches
from torch_secorder.approximations.progress import Progress
from torch_secorder.approximations.report_loop import accumulated
from torch_secorder.approximations.report_options import ReportOptions
from torch_secorder.arguments import fresh_generator
from torch_secorder.cli import changes
from torch_secorder.cli.checking import checked_as_text
from torch_secorder.cli.failures import DONE, INTERRUPTED, USAGE, CommandError, Interrupted, needed, told
from torch_secorder.cli.files import FORMATS, check_targets, write
from torch_secorder.cli.merging import merged
from torch_secorder.cli.options import FILE, check_options, report_options, table_options
from torch_secorder.cli.resuming import Journal
from torch_secorder.cli.setups import Setup
from torch_secorder.errors import CurvatureError, listed
from torch_secorder.results.results import Results
from torch_secorder.results.text import summary
from torch_secorder.version import VERSION

EXIT_CODES = (
    "Exit codes: 0 done; 1 refused or failed, with the reason on stderr and no table written; 2 a wrong command line; "
    "130 interrupted."
)
SAME = (  # options that must stay the same in a run that is resumed
    *("fisher", "num_samples", "loss_type", "reduction", "parameters", "seed", "diagonal"),
    *("class_axis", "ignore_index", "batch_axis", "loss", "labels", "shift", "max_samples"),
)


def run(arguments: Sequence[str] | None) -> int:
    """Run a command, and return its exit code."""
    try:
        return int(main.main(arguments, prog_name="torch-secorder", standalone_mode=False) or DONE)
    except click.UsageError as error:
        error.show()
        return USAGE
    except (CommandError, CurvatureError) as error:
        kind = "" if isinstance(error, CommandError) else f"{type(error).__name__}: "
        print(f"torch-secorder: {kind}{error}", file=sys.stderr)
        return getattr(error, "code", 1)
    except click.Abort:
        print("torch-secorder: interrupted; no file was written", file=sys.stderr)
        return INTERRUPTED


@click.group(
    help="How sensitive a PyTorch model is to each of its parameters, by the exact trace of the Fisher information.",
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    no_args_is_help=False,
)
@click.version_option(VERSION, message="torch-secorder %(version)s")
def main() -> None:
    """The commands below."""


@main.command(epilog=EXIT_CODES)
@report_options
def report(setup: Setup, by: str, max_batches: int | None, progress: bool | None, **options: Any) -> None:
    """The Fisher trace of every parameter of a model.

    Runs a function of yours that takes no argument and returns a torch.nn.Module, a loss(outputs, targets) (or None, where
    --fisher needs none), and an iterable of (inputs, targets) or of mappings, such as a DataLoader.
    """
    path, every, resume, seed = (options.pop(name) for name in ("save", "every", "resume", "seed"))
    diagonal: Path | None = options.pop("diagonal")
    files = _checked({form: options.pop(form) for form in FORMATS}, save=path, diagonal=diagonal)
    if path is None and (every or resume):
        raise click.UsageError("--every and --resume need --save STATE")
    if path is not None and path.exists() and not resume:
        raise CommandError(f"{path} is there already: pass --resume to go on from it, or remove it")
    if seed is not None:
        torch.manual_seed(seed)
    generator = fresh_generator(None if seed is None else torch.Generator().manual_seed(seed))
    shown = sys.stderr.isatty() if progress is None else progress
    bar = Progress(shown, options["fisher"], anywhere=progress is True)
    with setup.built() as (model, built_loss, data):
        journal = None
        if path is not None:
            given = options | {"seed": seed, "diagonal": diagonal is not None}
            journal = Journal(path, every, model, {name: given[name] for name in SAME}, generator)
        loss = options.pop("loss") or built_loss
        keeps = {"diagonal": diagonal is not None}
        asked = ReportOptions(progress=False, generator=generator, keeps=keeps, **options)
        earlier = journal.resumed() if journal and journal.path.exists() else None
        with _running(setup, journal):
            results = _counted(model, loss, batches(data, max_batches, bar), asked, earlier, bar, journal)
        if results is None:
            raise CommandError(f"the data of {setup} has no batch")
    if diagonal is not None:
        results.save_diagonal(diagonal)
    _finish(results, by, files)


def _counted(
    model: nn.Module,
    loss: Any,
    whole: Iterable[Any],
    options: ReportOptions,
    earlier: Results | None,
    bar: Progress,
    journal: Journal | None,
) -> Results | None:
    """The results of all batches, with those that an earlier run counted and saved; None without any batch."""
    results = earlier
    model = model if options.device is None else model.to(options.device)
    for results in accumulated(model, loss, journal.rest(whole) if journal else whole, options, earlier, bar):
        if journal:
            journal.count(results)
    if journal and results is not None:
        journal.save(results)
    return results


@main.command(epilog=EXIT_CODES)
@check_options
def check(setup: Setup, seed: int | None, loss: Literal["model"] | None, **options: Any) -> None:
    """The traces of the first batch beside those of a plain float64 loop over its samples.

    Takes the same function as report. The exit code is 1 if a trace is different. A trace that differs only by the rounding of
    the model's own precision is not.
    """
    if seed is not None:
        torch.manual_seed(seed)
    with setup.built() as (model, built_loss, data), _running(setup, None):
        batch = next(iter(batches(data, 1)), None)
        if batch is None:
            raise CommandError(f"the data of {setup} has no batch")
        found = testing.check(model, loss or built_loss, batch, **options)
    print(checked_as_text(found))
    if not found.attrs["equal"]:
        different = [str(name) for name in found.index[found["verdict"] == "different"]]
        raise CommandError(f"{listed(different, 'parameter')}: the library and the loop differ")


@contextmanager
def _running(setup: Setup, journal: Journal | None) -> Iterator[None]:
    """A block in which an error of the user's code is reported with its traceback, and a refusal in one line."""
    try:
        yield
    except (CommandError, CurvatureError):
        raise
    except KeyboardInterrupt:
        if journal is None or not journal.saved:
            raise
        raise Interrupted(f"interrupted; {journal.path} has {journal.saved} batches: pass --resume to go on") from None
    except Exception as error:
        raise CommandError(f"the model, the loss or the data of {setup} failed\n{told(error)}") from error


@main.command(epilog=EXIT_CODES)
@click.argument("states", type=FILE, nargs=-1, required=True, metavar="STATE...")
@click.option("--save", type=FILE, metavar="STATE", help="Also write the statistics of all.")
@table_options
def merge(states: tuple[Path, ...], by: str, save: Path | None, **options: Any) -> None:
    """One report of statistics that several runs saved.

    The files are those of torch-secorder report --save and of FisherMonitor.save, each of a part of the data.
    """
    files = _checked(options, save=save)
    needed("merge", "safetensors", "save")
    results = merged(states)
    if save is not None:
        results.save(save)
    _finish(results, by, files)


@main.command(epilog=EXIT_CODES)
@click.argument("before", type=FILE, metavar="A.csv")
@click.argument("after", type=FILE, metavar="B.csv")
@click.option("--csv", type=FILE, metavar="FILE", help="Also write the comparison as CSV.")
def compare(before: Path, after: Path, csv: Path | None) -> None:
    """What changed from one report to another.

    Shows what changed between two reports that --csv wrote: the ratio of the traces, and their difference in standard
    errors, taking the two sets of samples for independent.
    """
    check_targets([csv] if csv else [])
    index, rows, totals = changes.changes(before, after)
    print(changes.as_text(index, rows, totals))
    if csv:
        write({csv: changes.as_csv(index, rows)})


def _checked(tables: dict[str, Path | None], **tensors: Path | None) -> dict[str, Path]:
    """The tables to write, after checking that they and the files of tensors can be written, as far as that is known."""
    wanted = {form: path for form, path in tables.items() if path is not None}
    others = {option: path for option, path in tensors.items() if path is not None}
    check_targets([*wanted.values(), *others.values()])
    if "png" in wanted:
        needed("--png", "matplotlib", "plot")
    for option in others:
        needed(f"--{option}", "safetensors", "save")
    return wanted


def _finish(results: Results, by: str, files: dict[str, Path]) -> None:
    """Print the table, and write it."""
    rows: dict[str, Any] = {"parameter": None, "model": lambda name: "model"}
    table = results.report(rows.get(by, by))
    print(summary(table))
    write({path: FORMATS[form](table) for form, path in files.items()})
