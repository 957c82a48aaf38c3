"""How a command ends, and the message when it fails."""

from __future__ import annotations

import importlib.util
import os
import traceback

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class CommandError(Exception):
    """An error whose text goes to stderr in place of a traceback."""

    code = FAILED


class Interrupted(CommandError):
    """The command was interrupted; the text says what was saved."""

    code = INTERRUPTED


def needed(option: str, package: str, extra: str) -> None:
    """Refuse an option before the work if the package that it needs is missing.

    Raises:
        CommandError: if the package is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise CommandError(f"{option} needs {package}, which is not installed: pip install 'torch-secorder[{extra}]'")


def told(error: BaseException) -> str:
    """The traceback, from the user's own file on."""
    frames = traceback.extract_tb(error.__traceback__)
    library = os.path.dirname(os.path.dirname(__file__))
    own = [frame for frame in frames if not frame.filename.startswith(("<frozen", library))]
    lines = traceback.format_list(own) + traceback.format_exception_only(error)
    return "".join(lines).rstrip()
