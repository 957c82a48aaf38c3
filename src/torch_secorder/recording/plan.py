"""What is decided before anything runs: which modules are hooked, with which rule, on which batch axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn

from torch_secorder.batch_axis.placement import Placement
from torch_secorder.capture.records import Site
from torch_secorder.errors import ArgumentError, CurvatureError, UnsupportedError
from torch_secorder.model.parameters import ParameterTable, named_modules
from torch_secorder.model.ranks import class_as_written
from torch_secorder.rules import Rule, refusal_for, rule_for

BatchAxis = int | Mapping[str, int] | None


@dataclass(frozen=True)
class Plan:
    """How a model will be captured.

    Attributes:
        sites: the modules to hook.
        guards: modules that may be in a state in which no rule is right, with a check for each call.
        batch_axis: where the model's own inputs and outputs have the batch axis.
        placement: what the user says of a module's batch axis, by its name.
    """

    sites: list[Site]
    guards: dict[nn.Module, Callable[[], None]]
    batch_axis: int
    placement: Callable[[str], Placement | None]

    def watched(self, model: nn.Module) -> list[Site]:
        """Sites that only look at outputs, one for each module."""
        return [Site(name, module, {}, {}, {}, None, self.placement(name)) for name, module in named_modules(model)]


def planned(model: nn.Module, table: ParameterTable, batch_axis: BatchAxis = None) -> Plan:
    """The plan for a model.

    Modules without a rule are left to the autograd graph, where every use of a parameter can be found, unless it is frozen.

    Raises:
        UnsupportedError: naming every module without a rule that owns an analysed but frozen parameter.
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
            tensors = {local: table.leaves[position] for local, position in owned.items()}
            shapes = {local: table.rows[position].shape for local, position in owned.items()}
            sites.append(Site(name, module, owned, tensors, shapes, rule, axis(name)))
        elif frozen := [local for local, position in owned.items() if not table.tensors[position].requires_grad]:
            missing.append(f"{class_as_written(module).__name__} '{name}' ({', '.join(frozen)}): {rule}")
    if missing:
        raise UnsupportedError(
            "no exact rule for the frozen parameters of\n  "
            + "\n  ".join(missing)
            + "\nteach the library these layers with torch_secorder.register_rule, or let these parameters require a gradient, "
            "so that the autograd graph shows where they are used"
        )
    own = axis("")
    return Plan(sites, guards, own.axis if own else 0, axis)


def _axes(model: nn.Module, batch_axis: BatchAxis) -> Callable[[str], Placement | None]:
    if batch_axis is None:
        return lambda name: None
    if isinstance(batch_axis, int) and not isinstance(batch_axis, bool):
        return lambda name: Placement(batch_axis)
    if not isinstance(batch_axis, Mapping):
        raise ArgumentError(f"batch_axis must be an int or a mapping from module names to ints, not {batch_axis!r}")
    if unknown := set(batch_axis) - {name for name, _ in named_modules(model)}:
        raise ArgumentError(f"batch_axis names modules that the model lacks: {', '.join(sorted(unknown))}")
    return lambda name: Placement(batch_axis[name]) if name in batch_axis else None


def _refuse(name: str, module: nn.Module, refusal: Callable[[nn.Module], CurvatureError | None]) -> None:
    if (error := refusal(module)) is not None:
        raise type(error)(f"{class_as_written(module).__name__} '{name}': {error}")
