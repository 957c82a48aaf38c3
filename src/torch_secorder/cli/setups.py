"""The user's file, whose function returns what is analyzed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torch_secorder.cli.failures import CommandError, told


@dataclass(frozen=True)
class Setup:
    """The command's argument ``SETUP.py:FUNCTION``."""

    path: Path
    function: str

    @classmethod
    def parsed(cls, value: str) -> Setup:
        """The parts of a command line's argument.

        Raises:
            ValueError: if it has another form.
        """
        path, colon, function = value.rpartition(":")
        if not colon or not path.endswith(".py") or not function.isidentifier():
            raise ValueError(f"{value!r} is not of the form SETUP.py:FUNCTION")
        return cls(Path(path), function)

    def __str__(self) -> str:
        return f"{self.path}:{self.function}"

    @contextmanager
    def built(self) -> Iterator[tuple[torch.nn.Module, Any, Any]]:
        """A block with the function's model, loss and data, in which its file is imported.

        Raises:
            CommandError: if the file does not import, or the function does not return a model, a loss and data.
        """
        with self._imported() as build:
            try:
                found = build()
            except (Exception, SystemExit) as error:
                raise CommandError(f"{self}() failed\n{told(error)}") from error
            if not isinstance(found, (tuple, list)) or len(found) != 3:
                what = f"{len(found)} values" if isinstance(found, (tuple, list)) else type(found).__name__
                raise CommandError(f"{self}() must return (model, loss, data), not {what}")
            if not isinstance(found[0], torch.nn.Module):
                raise CommandError(f"{self}() must return a torch.nn.Module first, not {type(found[0]).__name__}")
            yield found[0], found[1], found[2]

    @contextmanager
    def _imported(self) -> Iterator[Callable[[], Any]]:
        """A block with the function, whose file may import its neighbors."""
        if not self.path.is_file():
            raise CommandError(f"there is no file {self.path}")
        spec = importlib.util.spec_from_file_location(f"_setup_{self.path.stem}", self.path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        folder = str(self.path.resolve().parent)
        sys.path.insert(0, folder)
        sys.modules[module.__name__] = module
        try:
            try:
                spec.loader.exec_module(module)
            except (Exception, SystemExit) as error:
                raise CommandError(f"{self.path} does not import\n{told(error)}") from error
            build = getattr(module, self.function, None)
            if not callable(build):
                raise CommandError(f"{self.path} has no function {self.function}; it defines {_defined(module)}")
            yield build
        finally:
            del sys.modules[module.__name__]
            if folder in sys.path:
                sys.path.remove(folder)


def _defined(module: Any) -> str:
    own = (n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__)
    return ", ".join(own) or "none"
