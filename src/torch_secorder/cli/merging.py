"""The statistics of several runs, merged into one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from torch_secorder.cli.failures import CommandError
from torch_secorder.errors import CurvatureError
from torch_secorder.results.results import Results
from torch_secorder.results.saving import load


def merged(paths: Sequence[Path]) -> Results:
    """The results in several files together.

    Raises:
        CommandError: naming a file that does not exist, is given twice, or does not fit the files before it.
        ArgumentError: if a file is torn or foreign.
    """
    contents: dict[str, Path] = {}
    models: dict[str, Path] = {}
    results: Results | None = None
    for path in paths:
        if not path.is_file():
            raise CommandError(f"there is no file {path}")
        if path.suffix == ".csv":
            raise CommandError(
                f"{path}: merge reads what --save wrote; tables that --csv wrote go to torch-secorder compare"
            )
        first = contents.setdefault(hashlib.blake2b(path.read_bytes()).hexdigest(), path)
        if first is not path:
            raise CommandError(f"{first} and {path} are the same statistics, which must not be counted twice")
        part, model = Results.load(path), load(path).get("run", {}).get("model")
        try:
            results = part if results is None else results.merge(part)
        except CurvatureError as error:
            raise CommandError(f"{path} can't be merged with those before it: {error}") from error
        if model is not None:
            models.setdefault(model, path)
        if len(models) > 1:
            raise CommandError(
                f"{path} is of other weights than {next(iter(models.values()))}: they don't belong together"
            )
    assert results is not None
    return results
