"""The parameters of a saved state, and whether a model has them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from torch_secorder.errors import ArgumentError
from torch_secorder.model.names import plain_name
from torch_secorder.model.packed import weight_shape
from torch_secorder.model.parameters import Parameter, unwrapped


def saved_parameters(state: Mapping[str, Any], path: str | Path) -> list[Parameter]:
    """The parameters of a state from a file.

    Raises:
        ArgumentError: if it is not a state of results.
    """
    if any(key not in state for key in ("names", "shapes", "keeps", "reduction", "module_types")):
        raise ArgumentError(f"{path} was not written by FisherMonitor.save")
    return [
        Parameter(name, name.rpartition(".")[0], kind, tuple(shape), math.prod(shape))
        for name, kind, shape in zip(state["names"], state["module_types"], state["shapes"], strict=True)
    ]


def require_parameters_of(model: nn.Module, rows: Iterable[Parameter], path: str | Path) -> None:
    """Raise unless the model has these parameters, in these shapes.

    Raises:
        ArgumentError: naming the first that differs.
    """
    model = unwrapped(model)
    owners = dict(model.named_modules(remove_duplicate=False))
    named = ((name.rpartition("."), p) for name, p in model.named_parameters())
    known = {plain_name("".join(path)): weight_shape(owners[path[0]], path[2], p) for path, p in named}
    for row in rows:
        if row.name not in known:
            raise ArgumentError(f"{path} is of different parameters: {type(model).__name__} has no {row.name!r}")
        if known[row.name] != row.shape:
            raise ArgumentError(f"{path}: {row.name} has shape {row.shape} there and {known[row.name]} in the model")
