"""The options of the commands of the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click
import torch

from torch_secorder.arguments import ErrorOf
from torch_secorder.cli.files import FORMATS
from torch_secorder.cli.setups import Setup
from torch_secorder.likelihoods import LOSS_TYPES

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]

POSITIVE, FROM_ZERO = click.IntRange(min=1), click.IntRange(min=0)
SEED = click.IntRange(-(2**63), 2**64 - 1)  # what torch.manual_seed takes
FILE = click.Path(path_type=Path)


def _setup(context: click.Context, parameter: click.Parameter, value: str) -> Setup:
    try:
        return Setup.parsed(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _device(_context: click.Context, _option: click.Parameter, value: str | None) -> torch.device | None:
    """The device of that name."""
    try:
        return None if value is None else torch.device(value)
    except RuntimeError:
        raise click.BadParameter(f"{value!r} is not a device of torch's") from None


def _choice(name: str, choices: list[str], default: str, text: str) -> Decorator:
    """An option with one of some values, of which the default is shown."""
    return click.option(name, type=click.Choice(choices), default=default, show_default=True, help=text)


def _together(*options: Decorator) -> Decorator:
    """Several options as one decorator; help shows them in this order."""

    def decorated(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorated


table_options = _together(
    _choice("--by", ["parameter", "module", "type", "model"], "parameter", "What a row is."),
    *(
        click.option(f"--{form}", type=FILE, metavar="FILE", help=f"Also write the table as {form.upper()}.")
        for form in FORMATS
    ),
)
_SETUP = click.argument("setup", callback=_setup, metavar="SETUP.py:FUNCTION")
_PARAMETERS = click.option(
    "--parameters",
    metavar="[trainable|all|PATTERN]",
    default="trainable",
    show_default=True,
    help="Which ones are analyzed, such as '*.weight'.",
)
_BATCH_AXIS = click.option(
    "--batch-axis", type=FROM_ZERO, metavar="AXIS", help="Where the samples are counted.  [default: 0, or found out]"
)
_MAX_MEMORY = click.option(
    "--max-memory", type=POSITIVE, metavar="BYTES", help="How much one parameter's computation may take at once."
)
_ENTRIES_OF_BATCHES = _together(
    click.option(
        "--loss",
        type=click.Choice(["model"]),
        help="The loss that the model computes itself, in place of the one that the function returns.",
    ),
    click.option("--labels", metavar="ENTRY", help="The entry of batches that are mappings with the targets."),
)
report_options = _together(
    _SETUP,
    _choice(
        "--fisher",
        ["empirical", "exact", "sampled", "observed"],
        "empirical",
        "Whose labels: the data's, by the loss; the model's own, averaged over all or sampled; or the data's, by the "
        "likelihood.",
    ),
    click.option(
        "--loss-type",
        metavar=f"[{'|'.join(LOSS_TYPES)}]",
        default="nll",
        show_default=True,
        help="The likelihood, where --fisher is not empirical.",
    ),
    click.option(
        "--class-axis",
        type=int,
        metavar="AXIS",
        default=1,
        show_default=True,
        help="The axis on which nll outputs have the classes.",
    ),
    click.option(
        "--ignore-index",
        type=int,
        metavar="LABEL",
        default=-100,
        show_default=True,
        help="The nll label that counts for nothing.",
    ),
    click.option("--shift", is_flag=True, help="The nll outputs at one position are about the label at the next."),
    click.option("--num-samples", type=POSITIVE, metavar="K", help="Backward passes per batch of --fisher sampled."),
    click.option("--max-batches", type=POSITIVE, metavar="K", help="Use at most this many batches."),
    click.option("--max-samples", type=POSITIVE, metavar="K", help="Use at most this many samples."),
    click.option("--rtol", type=float, metavar="R", help="Stop at a relative standard error of R, such as 0.05."),
    _choice(
        "--rtol-of",
        list(get_args(ErrorOf)),
        "total",
        "Whose error --rtol is about: that of the total, or of every row.",
    ),
    click.option(
        "--max-passes",
        type=POSITIVE,
        metavar="K",
        default=10_000,
        show_default=True,
        help="The most passes per batch of exact.",
    ),
    _MAX_MEMORY,
    click.option("--reduction", type=click.Choice(["mean", "sum"]), help="By default as the loss does."),
    _BATCH_AXIS,
    _PARAMETERS,
    click.option(
        "--seed", type=SEED, metavar="N", help="For torch.manual_seed before SETUP.py is run, and for sampled labels."
    ),
    click.option(
        "--device", callback=_device, metavar="D", help="Bring the model and the data there, to cuda or mps say."
    ),
    click.option(
        "--verify/--no-verify", default=True, help="Check three samples by plain autograd.  [default: verify]"
    ),
    click.option(
        "--progress/--no-progress",
        default=None,
        help="A progress bar on stderr, with tqdm.  [default: on a terminal]",
    ),
    click.option(
        "--diagonal",
        type=FILE,
        metavar="FILE",
        help="Also write the Fisher diagonal of every parameter (safetensors).",
    ),
    click.option(
        "--save", type=FILE, metavar="STATE", help="Write the statistics to a file, to merge or to go on from."
    ),
    click.option("--every", type=POSITIVE, metavar="M", help="Write STATE after every M batches too."),
    click.option("--resume", is_flag=True, help="Go on from STATE, if it is there."),
    _ENTRIES_OF_BATCHES,
    table_options,
)
check_options = _together(
    _SETUP,
    _PARAMETERS,
    _BATCH_AXIS,
    _MAX_MEMORY,
    click.option("--seed", type=SEED, metavar="N", help="For torch.manual_seed before SETUP.py is run."),
    click.option("--verify/--no-verify", default=True, help="Let the library check itself too.  [default: verify]"),
    _ENTRIES_OF_BATCHES,
)
