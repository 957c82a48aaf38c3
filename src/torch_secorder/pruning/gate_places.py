"""Where gates are: on a module's output or input, on which axis, and one for each channel or for each block of channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypedDict, get_args

from torch import Tensor, nn

from torch_secorder.arguments import Side, require_choice, require_positive_int
from torch_secorder.errors import ArgumentError, ShapeError, UnsupportedError
from torch_secorder.model.channels import channel_axis
from torch_secorder.model.parameters import named_modules
from torch_secorder.model.ranks import class_as_written
from torch_secorder.rules import Rule, rule_for

ANY_CONVOLUTION: Any = nn.Conv1d.__base__
_NORMS: Any = (nn.BatchNorm1d.__base__, nn.InstanceNorm1d.__base__, nn.GroupNorm)

# Modules whose outputs end in features, and modules that have channels behind the samples.
FEATURES_LAST = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)
CHANNELS_SECOND = (ANY_CONVOLUTION, nn.PReLU, *_NORMS)

# The rules of the layers whose input gradient can be computed from the output's.
WITH_INPUT_GRADIENT = ("linear", "conv1d", "convolution", "transposed_convolution")


class GateOptions(TypedDict, total=False):
    """The options of one module's gates."""

    side: Side
    groups: int | None
    axis: int


Watched = Mapping[str, GateOptions] | tuple[type[nn.Module], ...] | Callable[[str], bool] | None


@dataclass(frozen=True)
class GatePlace:
    """Where a module has its gates.

    Attributes:
        side: "output" or "input".
        axis: the axis of the output or the input that counts channels; it may be negative.
        groups: the number of gates, each for an equal block of channels; None for one gate per channel.
        of_weights: whether the axis counts channels of the module's weight, so that a gate can be closed by masking them.
    """

    side: Side
    axis: int
    groups: int | None
    of_weights: bool

    def sums(self, product: Tensor, batch_axis: int | None) -> Tensor:
        """The gradients of the gates, ``[n, gates]``, from values times gradients, which have the samples first.

        Args:
            product: the output or input times its gradient.
            batch_axis: the axis of the samples before they were moved to the first; None if the call had no batch axis.

        Raises:
            ShapeError: if the axis counts the samples, or its channels cannot be split into equal groups.
        """
        product = product.movedim(self._axis_behind(product.dim(), batch_axis), 1)
        sums = product.flatten(2).sum(2) if product.dim() > 2 else product
        if self.groups is None:
            return sums
        if sums.shape[1] % self.groups:
            raise ShapeError(f"the {sums.shape[1]} channels of its {self.side} are no {self.groups} equal groups")
        return sums.unflatten(1, (self.groups, -1)).sum(2)

    def _axis_behind(self, dims: int, batch_axis: int | None) -> int:
        """The axis of the channels once the samples come first, in a product with ``dims`` axes."""
        own = dims - (batch_axis is None)  # a call without a batch axis was given one in front
        if not -own <= self.axis < own:
            raise ShapeError(f"its {self.side} has no axis {self.axis} that counts channels, but {own} axes: say axis=")
        axis = self.axis % own
        if batch_axis is None:
            return axis + 1
        if axis == batch_axis:
            raise ShapeError(f"axis {axis} counts its channels and can't count the samples: say axis=")
        return axis + 1 if axis < batch_axis else axis


def gate_places(model: nn.Module, modules: Watched) -> dict[str, GatePlace]:
    """Module name -> where it has its gates, from the argument ``modules`` of :class:`~torch_secorder.pruning.Gates`.

    Raises:
        ArgumentError: for invalid options, patterns that no module matches, or a module whose channel axis is unknown.
        UnsupportedError: for gates on the input of a module whose input gradient is not known.
    """
    _check_modules(modules)
    named = dict(named_modules(model))
    options = dict(_options(named, modules))
    if not options:
        raise ArgumentError(f"{type(model).__name__} has no module of those to watch")
    return {name: _place(name, module, options[name]) for name, module in named.items() if name in options}


def _options(named: Mapping[str, nn.Module], modules: Watched) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The names of the modules that have gates, each with its options."""
    if isinstance(modules, Mapping):
        for pattern, options in modules.items():
            _check_options(pattern, options)
            matching = [name for name in named if fnmatchcase(name, str(pattern))]
            if not matching:
                raise ArgumentError(f"modules: the model has no module whose name matches {pattern!r}")
            yield from ((name, options) for name in matching)
        return
    for name, module in named.items():
        if modules is None:
            watched = isinstance(module, (ANY_CONVOLUTION, nn.Linear)) or type(module).__name__ == "Conv1D"
        else:
            watched = isinstance(module, modules) if isinstance(modules, (tuple, type)) else bool(modules(name))
        if watched:
            yield name, {}


def _check_modules(modules: Any) -> None:
    """Raise for names where patterns with options, types or a function are expected."""
    if isinstance(modules, str) or (isinstance(modules, (list, set)) and all(isinstance(one, str) for one in modules)):
        patterns = [modules] if isinstance(modules, str) else list(modules)
        meant = ", ".join(f'"{pattern}": {{}}' for pattern in patterns)
        raise ArgumentError(
            f"modules must be a mapping from patterns of names to options, not {modules!r}: pass {{{meant}}} for gates on their "
            'outputs, with {"side": "input", "groups": heads} in the place of {} for gates on heads'
        )
    if isinstance(modules, nn.Module):
        raise ArgumentError(
            f"modules says which modules of the model have gates, and can't be a {type(modules).__name__}: gates take no loss, "
            "but watch the backward passes of your own loop in their block"
        )
    types = isinstance(modules, tuple) and all(isinstance(one, type) for one in modules)
    if not (modules is None or types or isinstance(modules, Mapping) or callable(modules)):
        raise ArgumentError(
            "modules must be a mapping from patterns of names to options, a tuple of types of modules, or a function from a "
            f"name to whether it is watched, not {modules!r:.80}"
        )


def _check_options(pattern: str, options: Any) -> None:
    if not isinstance(options, Mapping) or not options.keys() <= {"side", "groups", "axis"}:
        raise ArgumentError(
            f"modules[{pattern!r}] must be a mapping with some of the keys 'side', 'groups' and 'axis', not {options!r:.80}"
        )
    require_choice(f"modules[{pattern!r}]['side']", options.get("side", "output"), get_args(Side))
    if options.get("groups") is not None:
        require_positive_int(f"modules[{pattern!r}]['groups']", options["groups"])
    if not isinstance(axis := options.get("axis", 0), int) or isinstance(axis, bool):
        raise ArgumentError(f"modules[{pattern!r}]['axis'] must be an int, not {axis!r}")


def _place(name: str, module: nn.Module, options: Mapping[str, Any]) -> GatePlace:
    side, kind = options.get("side", "output"), class_as_written(module).__name__
    rule = rule_for(module)
    if side == "input":
        if not isinstance(rule, Rule) or rule.name not in WITH_INPUT_GRADIENT:
            reason = rule if isinstance(rule, str) else "it is neither a linear layer nor a convolution"
            raise UnsupportedError(
                f"{kind} '{name}': gates on its input take the input's gradient, which is not known here ({reason}): watch the "
                'output of the module in front of it, {"side": "output"}'
            )
        if _pads_otherwise(module):
            raise UnsupportedError(
                f"{kind} '{name}': gates on the input of a convolution take padding by a number of zeros: watch the output of "
                'the module in front of it, {"side": "output"}'
            )
    natural = _natural_axis(module, rule)
    if natural is None and options.get("axis") is None:
        raise ArgumentError(
            f"{kind} '{name}': which axis of its {side} counts channels is not known: say so with "
            f'{{"{name}": {{"axis": 1}}}}, or -1 for features at the end'
        )
    axis = options.get("axis")
    axis = natural if axis is None else axis
    assert axis is not None
    if (groups := options.get("groups")) is not None and axis == natural:
        _require_equal_groups(f"{kind} '{name}'", module, side, groups)
    return GatePlace(side, axis, options.get("groups"), axis == natural)


def _require_equal_groups(site: str, module: nn.Module, side: str, groups: int) -> None:
    """Raise if a module's sizes show that its channels cannot be split into equal groups."""
    channels = _channels(module, side)
    if channels is not None and channels % groups:
        raise ArgumentError(
            f"{site}: the {channels} channels of its {side} are no {groups} equal groups: groups has to divide {channels}"
        )


def gate_count(module: nn.Module, place: GatePlace) -> int | None:
    """How many gates a module has; None if nothing but its output shows that."""
    if place.groups is not None:
        return place.groups
    return _channels(module, place.side) if place.of_weights else None


def _channels(module: nn.Module, side: str) -> int | None:
    """How many channels a module has on one side, if its sizes or its weight show that."""
    names = ("out_features", "out_channels") if side == "output" else ("in_features", "in_channels")
    if isinstance(module, (nn.Linear, ANY_CONVOLUTION)):
        return next((getattr(module, name) for name in names if isinstance(getattr(module, name, None), int)), None)
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and (isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"):
        return weight.shape[weight_axis(module, side)]
    if isinstance(weight, Tensor) and isinstance(module, (nn.LayerNorm, nn.RMSNorm, *_NORMS)):
        return weight.shape[-1]
    return None


def _natural_axis(module: nn.Module, rule: Rule | str) -> int | None:
    """The axis on which outputs and inputs of a module have their channels; None if that is not known."""
    by_rule = isinstance(rule, Rule) and rule.name in ("conv1d", "rms_norm")
    if by_rule or isinstance(module, FEATURES_LAST) or type(module).__name__ == "Conv1D":
        return -1
    return 1 if isinstance(module, CHANNELS_SECOND) else None


def _pads_otherwise(module: nn.Module) -> bool:
    """Whether a module is a convolution with another padding than a number of zeros."""
    if not isinstance(module, ANY_CONVOLUTION):
        return False
    return isinstance(module.padding, str) or getattr(module, "padding_mode", "zeros") != "zeros"


def weight_axis(module: nn.Module, side: str) -> int:
    """The axis of a module's weight that counts the channels of its output or its input."""
    outputs = 1 if isinstance(module, nn.Embedding) else channel_axis(module)
    return outputs if side == "output" else 1 - outputs
