"""The lists of modules and parameters are those that torch makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from torch_secorder.model.tree import modules_by_path, parameters_by_path


def shared() -> nn.Module:
    layer = nn.Linear(2, 2)
    return nn.Sequential(
        layer, nn.Sequential(nn.Tanh(), layer), nn.ModuleDict({"again": layer, "new": nn.Linear(2, 2)})
    )


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    model[1][1].weight = model[0].weight
    return model


def with_gaps() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.LayerNorm(2, elementwise_affine=False))
    model.register_module("gap", None)
    model.register_parameter("gain", nn.Parameter(torch.ones(2)))
    return model


def deep() -> nn.Module:
    model: nn.Module = nn.Linear(2, 2)
    for _ in range(5):
        model = nn.Sequential(nn.Tanh(), model, nn.Linear(2, 2))
    return model


class Renames(nn.Sequential):
    """Names its modules and parameters without the first letter of their paths."""

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        return ((name[1:], module) for name, module in super().named_modules(*args, **kwargs))


class Hides(nn.Sequential):
    """Shows only some of its parameters."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in super().named_parameters(*args, **kwargs) if name.endswith("weight"))


MODELS: list[Callable[[], nn.Module]] = [
    *(shared, tied, with_gaps, deep, lambda: nn.Linear(2, 2), lambda: nn.Transformer(8, 2, 1, 1, 8, batch_first=True)),
    *(lambda: Renames(nn.Linear(2, 2)), lambda: nn.Sequential(Renames(nn.Linear(2, 2)), nn.Linear(2, 2))),
    *(lambda: Hides(nn.Linear(2, 2)), lambda: nn.Sequential(Hides(nn.Linear(2, 2)))),
]


@pytest.mark.parametrize("make", MODELS)
def test_the_lists_are_those_of_torch(make: Callable[[], nn.Module]) -> None:
    model = make()
    modules = modules_by_path(model)
    assert modules == list(model.named_modules())
    found = parameters_by_path(model, modules)
    assert [(name, id(p)) for name, p in found] == [(name, id(p)) for name, p in model.named_parameters()]
    assert len(found) > 0
