"""A stand-in for torchvision, which does not import beside every build of torch: names without anything behind them.

timm and others import names of it for their data pipelines, which no model here uses. Only the processes that run those
libraries' models have it, since transformers asks whether torchvision is there.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

from torch import nn


class Nothing(type):
    """The type of classes whose every attribute is a text with its name, such as InterpolationMode.BILINEAR."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class Empty(ModuleType):
    __path__: list[str] = []  # noqa: RUF012  (a package, so that names below it can be imported)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = Nothing(name, (nn.Module,), {})
        setattr(self, name, made)
        return made


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        return Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def stand_in() -> None:
    sys.meta_path.append(Finder())
