"""The command line: ``torch-secorder report SETUP.py:build``, and ``check``, ``compare`` and ``merge`` beside it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch_secorder.cli.failures import FAILED

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit code: 0 done, 1 refused or failed, 2 a wrong command line, 130 interrupted.

    Args:
        arguments: of the command line; by default those of the process.

    Example:
        >>> from torch_secorder.cli import main
        >>> # There are no such files; the reason goes to stderr.
        >>> main(["compare", "before.csv", "after.csv"])
        1
    """
    try:
        from torch_secorder.cli.commands import run
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        print("torch-secorder: the command needs click: pip install 'torch-secorder[cli]'", file=sys.stderr)
        return FAILED
    return run(arguments)
