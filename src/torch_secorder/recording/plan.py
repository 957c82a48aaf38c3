"""What is decided before anything runs: which modules are hooked, with which rule, on which batch axis."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from torch_secorder.autograd.hooks import hook_counts
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.batch_axis.told import NOTHING, Told
from torch_secorder.capture.records import HookedModule
from torch_secorder.capture.watched_calls import watched_call
from torch_secorder.errors import CurvatureError, UnsupportedError
from torch_secorder.model.parameters import ParameterTable, named_modules
from torch_secorder.model.ranks import class_as_written
from torch_secorder.model.tree import Modules
from torch_secorder.recording.quantities import QUANTITIES
from torch_secorder.rules import ClassRule, Rule, refusal_for, rule_for

NamedModule = tuple[str, nn.Module]


@dataclass(frozen=True)
class Plan:
    """How a model will be captured.

    Attributes:
        model: the model to hook; None if its graph exists already.
        modules: all of its modules, under their plain names.
        sites: the modules to hook.
        guards: modules that may be in a state in which no rule is right, with a check that runs before each call.
        words: what the user says about where the samples are.
    """

    model: nn.Module | None = None
    modules: Sequence[NamedModule] = ()
    sites: Sequence[HookedModule] = ()
    guards: Mapping[nn.Module, Callable[[], None]] = field(default_factory=dict)
    words: Told = NOTHING

    def state(self) -> Hashable:
        """What the numbers could depend on besides the graph; two plans of an unchanged model have equal states.

        The state has the rules with their parameters, every module's mode, and its number of hooks.
        """
        sites = [(site.name, site.positions, getattr(site.rule, "function", None)) for site in self.sites]
        tensors = [(id(p), p.dtype, p.device) for site in self.sites for p in site.tensors.values()]
        modules = [module for _, module in self.modules]
        modes = tuple([module.training for module in modules])
        return tuple(sites), tuple(tensors), tuple(map(id, modules)), modes, hook_counts(modules)


def planned(
    model: nn.Module,
    table: ParameterTable,
    words: Told = NOTHING,
    quantities: Iterable[str] = (),
    listed: Modules | None = None,
) -> Plan:
    """The plan for a model.

    Modules without a rule are left to the autograd graph, which shows every use of a parameter unless the parameter is frozen.

    Args:
        model: the model.
        table: its analyzed parameters.
        words: what the user says about where the samples are.
        quantities: the names of what is kept besides squared norms.
        listed: all of its modules with their paths, if the caller has just listed them.

    Raises:
        UnsupportedError: naming every module without a rule that owns an analyzed but frozen parameter.
    """
    placement = words.placement
    sites: list[HookedModule] = []
    missing: list[str] = []
    modules, classes = named_modules(model, listed), dict[type[nn.Module], ClassRule]()
    for name, module in modules:
        if not module._parameters or not (owned := table.owned(module)):
            continue
        rule = rule_for(module, classes)
        if isinstance(rule, Rule):
            tensors = {local: table.leaves[position] for local, position in owned.items()}
            shapes = {local: table.rows[position].shape for local, position in owned.items()}
            sites.append(HookedModule(name, module, owned, tensors, shapes, rule, placement(name)))
        elif frozen := [local for local, position in owned.items() if not table.tensors[position].requires_grad]:
            missing.append(f"{class_as_written(module).__name__} '{name}' ({', '.join(frozen)}): {rule}")
    if missing:
        raise UnsupportedError(
            "no exact rule for the frozen parameters of\n  "
            + "\n  ".join(missing)
            + "\nteach the library these layers with torch_secorder.register_rule, or let these parameters require a gradient, "
            "so that the autograd graph shows where they are used"
        )
    if any(QUANTITIES[name].watches_outputs for name in quantities):
        sites += _watched(modules, placement, set(quantities))
    return Plan(model, modules, sites, guards(modules), words)


def _watched(
    modules: Sequence[NamedModule], placement: Callable[[str], Placement | None], quantities: Collection[str]
) -> list[HookedModule]:
    """One hooked module for each module, which only looks at its output."""
    keep = partial(watched_call, with_moments="activations" in quantities, with_output="on_output" in quantities)
    return [
        HookedModule(name, module, {}, {}, {}, None, placement(name), keep, number)
        for number, (name, module) in enumerate(modules)
    ]


def guards(modules: Sequence[NamedModule]) -> dict[nn.Module, Callable[[], None]]:
    """For each module that may be in a state in which no rule is right, a function that raises if it is in that state."""
    kinds = {type(module) for _, module in modules}
    refusals = {kind: refusal for kind in kinds if (refusal := refusal_for(kind)) is not None}
    if not refusals:
        return {}
    return {
        module: partial(_refuse, name, module, refusals[type(module)])
        for name, module in modules
        if type(module) in refusals
    }


def _refuse(name: str, module: nn.Module, refusal: Callable[[nn.Module], CurvatureError | None]) -> None:
    if (error := refusal(module)) is not None:
        raise type(error)(f"{class_as_written(module).__name__} '{name}': {error}")
