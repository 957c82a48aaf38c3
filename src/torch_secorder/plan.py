"""What is decided before anything runs: which modules are hooked, with which rule, on which batch axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn

from torch_secorder.capture import Site
from torch_secorder.errors import ArgumentError, CurvatureError, UnsupportedError
from torch_secorder.parameters import ParameterTable, named_modules
from torch_secorder.rules import Rule, refusal_for, rule_for

BatchAxis = int | Mapping[str, int] | None


@dataclass(frozen=True)
class Plan:
    """How a model will be captured.

    Attributes:
        sites: the modules to hook.
        guards: modules that may be in a state in which no rule is right, with a check for each call.
        batch_axis: where the model's own inputs have the batch axis.
    """

    sites: list[Site]
    guards: dict[nn.Module, Callable[[], None]]
    batch_axis: int
    axis: Callable[[str], int]

    def watched(self, model: nn.Module) -> list[Site]:
        """Sites that only look at outputs, one for each module."""
        return [Site(name, module, {}, {}, None, self.axis(name)) for name, module in named_modules(model)]


def planned(model: nn.Module, table: ParameterTable, batch_axis: BatchAxis = None) -> Plan:
    """The plan for a model.

    Raises:
        UnsupportedError: naming every module that owns an analysed parameter and has no rule.
        ArgumentError: if ``batch_axis`` is neither an axis nor a mapping from module names to axes.
    """
    axis = _axes(model, batch_axis)
    sites: list[Site] = []
    missing: list[str] = []
    guards: dict[nn.Module, Callable[[], None]] = {}
    for name, module in named_modules(model):
        if (refusal := refusal_for(module)) is not None:
            guards[module] = partial(_refuse, name, module, refusal)
        if not (owned := table.owned(module)):
            continue
        rule = rule_for(module)
        if isinstance(rule, Rule):
            tensors = {local: table.tensors[position] for local, position in owned.items()}
            sites.append(Site(name, module, owned, tensors, rule, axis(name)))
        else:
            missing.append(f"{type(module).__name__} '{name}' ({', '.join(owned)}): {rule}")
    if missing:
        raise UnsupportedError(
            "no exact rule for the parameters of\n  "
            + "\n  ".join(missing)
            + "\nteach the library these layers with torch_secorder.register_rule, or freeze these parameters "
            "(requires_grad_(False)) to leave them out"
        )
    return Plan(sites, guards, axis(""), axis)


def _axes(model: nn.Module, batch_axis: BatchAxis) -> Callable[[str], int]:
    if batch_axis is None:
        return lambda name: 0
    if isinstance(batch_axis, int) and not isinstance(batch_axis, bool):
        return lambda name: batch_axis
    if not isinstance(batch_axis, Mapping):
        raise ArgumentError(f"batch_axis must be an int or a mapping from module names to ints, not {batch_axis!r}")
    if unknown := set(batch_axis) - {name for name, _ in named_modules(model)}:
        raise ArgumentError(f"batch_axis names modules that the model lacks: {', '.join(sorted(unknown))}")
    return lambda name: batch_axis.get(name, 0)


def _refuse(name: str, module: nn.Module, refusal: Callable[[nn.Module], CurvatureError | None]) -> None:
    if (error := refusal(module)) is not None:
        raise type(error)(f"{type(module).__name__} '{name}': {error}")
