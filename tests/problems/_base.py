"""What a problem is, and the shorthand in which the lists are written."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from oracles import Inputs, call, mapped


def seed(number: int) -> None:
    """Start random numbers anew; ``torch.manual_seed`` takes a millisecond for kinds of devices that are not there."""
    if torch.empty(0).device.type == "cpu":  # Torch 2.8 forgets its default device once another was taken back.
        torch.default_generator.manual_seed(number)
    else:
        torch.manual_seed(number)


@dataclass(frozen=True)
class Problem:
    """A model and inputs; the targets are random numbers of the output's shape and the loss is a mean squared error."""

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    training: bool = False
    no_vmap: str = ""  # why torch.func can't run it
    refusal: str = ""  # what fisher_report says of it, as a regular expression, if it refuses

    def setting(self, dtype: torch.dtype = torch.float64) -> Setting:
        """The same model, inputs and targets at every call, whatever the random state."""
        with torch.random.fork_rng():
            seed(zlib.crc32(self.name.encode()))
            model = randomized(self.model()).to(dtype).train(self.training)
            inputs = mapped(self.inputs(), lambda x: x.to(dtype) if x.is_floating_point() else x)
            with torch.no_grad():
                targets = torch.randn(call(model, inputs).shape).to(dtype)
            return Setting(model, inputs, targets)

    def __str__(self) -> str:
        return self.name


@dataclass
class Setting:
    model: nn.Module
    inputs: Inputs
    targets: Tensor

    def loss(self, reduction: str = "mean") -> Tensor:
        return nn.MSELoss(reduction=reduction)(call(self.model, self.inputs), self.targets)


def randomized(model: nn.Module) -> nn.Module:
    """`model` with no parameter or running statistic left at a value that hides mistakes, such as 0 or 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not isinstance(parameter, nn.UninitializedParameter):
                parameter.normal_(std=0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model


@dataclass
class Family:
    """Collects the problems of one layer family under names such as "conv-2d-circular"."""

    name: str
    problems: list[Problem] = field(default_factory=list)

    def add(
        self, name: str, model: Callable[[], nn.Module], inputs: Callable[[], Inputs] | tuple[int, ...], **options: Any
    ) -> None:
        shape = inputs
        draw = partial(torch.randn, shape) if isinstance(shape, tuple) else inputs
        self.problems.append(Problem(f"{self.name}-{name}", model, draw, **options))  # type: ignore[arg-type]


class Forward(nn.Module):
    """Modules by name and a forward given as a function of (self, *inputs): a model in one expression."""

    def __init__(self, function: Callable[..., Tensor], **modules: nn.Module):
        super().__init__()
        self._function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self, *args, **kwargs)


def ids(*shape: int, vocabulary: int = 5) -> Callable[[], Tensor]:
    """Token ids in which repeats within a sample are certain: fewer words than positions, or the caller's own."""
    return lambda: torch.randint(vocabulary, shape)


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model
