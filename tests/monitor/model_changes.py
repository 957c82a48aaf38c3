"""A model, and what users change about it between two blocks of a monitor."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from torch_secorder import FisherMonitor

Change = Callable[[nn.Sequential], "nn.Module | None"]


class Scale(nn.Module):
    """A layer that no rule is for."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width).double())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Doubled(nn.Linear):
    """A Linear that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def net() -> nn.Sequential:
    layers = [
        nn.Linear(4, 5),
        nn.BatchNorm1d(5),
        nn.Tanh(),
        nn.Linear(5, 5),
        nn.Tanh(),
        nn.Linear(5, 5),
        nn.Linear(5, 3),
    ]
    return nn.Sequential(*layers[:4], Scale(5), *layers[4:]).double().eval()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 4).double(), torch.randint(3, (6,))


def watched(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> pd.DataFrame:
    """The report of a block around one step."""
    with FisherMonitor(model, **options) as monitor:
        F.cross_entropy(model(x), y).backward()
    model.zero_grad()
    return monitor.report()


# Modules


def replace_a_module(model: nn.Sequential) -> None:
    model[3] = nn.Linear(5, 5).double()


def replace_a_module_by_a_wider_one(model: nn.Sequential) -> None:
    model[6], model[7] = nn.Linear(5, 9).double(), nn.Linear(9, 3).double()


def add_a_module(model: nn.Sequential) -> None:
    model.insert(4, nn.Linear(5, 5).double())


def add_frozen_modules(model: nn.Sequential) -> None:
    model[5] = nn.Sequential(nn.Tanh(), nn.Linear(5, 5).double().requires_grad_(False))


def remove_a_module(model: nn.Sequential) -> None:
    del model[6]


def share_a_module(model: nn.Sequential) -> None:
    model[6] = model[3]


def wrap_a_module(model: nn.Sequential) -> None:
    model[3] = nn.Sequential(model[3], Scale(5))


def swap_two_modules(model: nn.Sequential) -> None:
    model[3], model[6] = model[6], model[3]


# Parameters


def replace_a_parameter(model: nn.Sequential) -> None:
    model[3].weight = nn.Parameter(torch.randn(5, 5).double())


def remove_a_parameter(model: nn.Sequential) -> None:
    model[3].bias = None


def add_a_parameter(model: nn.Sequential) -> None:
    model[3] = nn.Linear(5, 5, bias=False).double()
    watched(model, *batch())
    model[3].bias = nn.Parameter(torch.randn(5).double())


def tie_two_parameters(model: nn.Sequential) -> None:
    model[6].weight = model[3].weight


def untie_two_parameters(model: nn.Sequential) -> None:
    tie_two_parameters(model)
    watched(model, *batch())
    model[6].weight = nn.Parameter(model[3].weight.detach().clone())


def set_other_data(model: nn.Sequential) -> None:
    model[7].weight.data, model[7].bias.data = torch.randn(4, 5).double(), torch.randn(4).double()


def freeze_a_parameter(model: nn.Sequential) -> None:
    model[3].weight.requires_grad_(False)


def freeze_a_module(model: nn.Sequential) -> None:
    model[0].requires_grad_(False)


def unfreeze_a_module(model: nn.Sequential) -> None:
    freeze_a_module(model)
    watched(model, *batch())
    model[0].requires_grad_(True)


def change_the_dtype(model: nn.Sequential) -> None:
    model.float()


# Forwards and hooks


class Twice:
    """Another forward of one layer, which a copy of the layer has for itself."""

    def __init__(self, layer: nn.Linear):
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        return 2 * F.linear(x, self.layer.weight, self.layer.bias)


def patch_a_forward(model: nn.Sequential) -> None:
    model[3].forward = Twice(model[3])  # type: ignore[assignment,method-assign,arg-type]


def change_a_class(model: nn.Sequential) -> None:
    model[3].__class__ = Doubled


def scale_an_output(model: nn.Sequential) -> None:
    model[3].register_forward_hook(lambda module, args, output: 3 * output)


def scale_an_input(model: nn.Sequential) -> None:
    model[3].register_forward_pre_hook(lambda module, args: (3 * args[0],))


# Parameters that are computed from others


def normalize_a_weight(model: nn.Sequential) -> None:
    parametrizations.weight_norm(model[3])


def no_longer_normalize_a_weight(model: nn.Sequential) -> None:
    normalize_a_weight(model)
    watched(model, *batch())
    parametrize.remove_parametrizations(model[3], "weight")


def prune_a_weight(model: nn.Sequential) -> None:
    prune.random_unstructured(model[3], "weight", 0.5)


def no_longer_prune_a_weight(model: nn.Sequential) -> None:
    prune_a_weight(model)
    watched(model, *batch())
    prune.remove(model[3], "weight")


# Other models that took its place


def copy_it(model: nn.Sequential) -> nn.Module:
    copied = copy.deepcopy(model)
    replace_a_parameter(copied)
    return copied


def pickle_it(model: nn.Sequential) -> nn.Module:
    data = pickle.dumps(model)
    assert b"torch_secorder" not in data
    return pickle.loads(data)


def pickle_it_inside_of_a_block(model: nn.Sequential) -> nn.Module:
    with FisherMonitor(model):
        data = pickle.dumps(model)
    loaded: nn.Module = pickle.loads(data)
    watched(loaded, *batch())
    return loaded


def compile_it(model: nn.Sequential) -> nn.Module:
    return torch.compile(model, backend="eager")._orig_mod  # type: ignore[attr-defined]  # of the wrapper


def compile_a_module(model: nn.Sequential) -> None:
    model[3] = torch.compile(model[3], backend="eager")


CHANGES: list[Change] = [
    *(replace_a_module, replace_a_module_by_a_wider_one, add_a_module, remove_a_module, share_a_module, wrap_a_module),
    add_frozen_modules,
    *(swap_two_modules, replace_a_parameter, remove_a_parameter, add_a_parameter, tie_two_parameters),
    *(untie_two_parameters, set_other_data, freeze_a_parameter, freeze_a_module, unfreeze_a_module, change_the_dtype),
    *(patch_a_forward, change_a_class, scale_an_output, scale_an_input, normalize_a_weight),
    *(no_longer_normalize_a_weight, prune_a_weight, no_longer_prune_a_weight, copy_it, pickle_it),
    *(pickle_it_inside_of_a_block, compile_it, compile_a_module),
]
