"""What the user says of where samples are: ``batch_axis=``, ``n_samples=`` and ``sample_of=``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from torch_secorder.arguments import described, require_positive_int
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.errors import ArgumentError
from torch_secorder.model.containers import Key
from torch_secorder.model.parameters import named_modules

# Where one argument, output or target has its samples: an axis; LIST for a list with an item for each of them; None for what all
# samples share.
Axis = int | str | None
LIST = "list"

Axes = Axis | Mapping[Key, Axis]
BatchAxis = int | Mapping[str, Any] | None
NSamples = int | Callable[..., Any] | None
SampleOf = Tensor | Key | Callable[..., Tensor] | None

AS_OUTPUTS = "as the outputs"

SIDES = ("inputs", "outputs", "targets")


@dataclass(frozen=True, eq=False)
class Told:
    """What the user says, for one model.

    Attributes:
        inputs: where the model's arguments have their samples: for all of them, or by position or name; 0 for what is not named.
        outputs: the same for what it returns, by position or key.
        targets: the same for what the loss takes besides; by default as the outputs.
        modules: where modules' outputs have them: for all of them, or by patterns of names; None where nothing is said.
        n_samples: how many samples a call has, or a function of the call's arguments that says it.
        sample_of: the sample of each row of the tensors that count rows, or the argument that is it, or a function of the call's
            arguments that says it.
        input_names: the names of the model's positional arguments, where arguments are spoken of one by one.
        says_outputs: whether the user says anything of the outputs, if only that the samples are first.
    """

    inputs: Axes = 0
    outputs: Axes = 0
    targets: Axes = AS_OUTPUTS
    modules: int | Mapping[str, int] | None = None
    n_samples: NSamples = None
    sample_of: SampleOf = None
    input_names: tuple[str, ...] = ()
    says_outputs: bool = False

    def axes(self, side: str) -> Axes:
        """Where the arguments, outputs or targets have their samples; targets have them where outputs do, if nothing is said."""
        if side == "targets" and self.targets is AS_OUTPUTS:
            return 0 if isinstance(self.outputs, Mapping) or self.outputs is None else self.outputs
        found: Axes = getattr(self, side)
        return found

    def axis(self, side: str, key: Key) -> Axis:
        """Where an argument, output or target has its samples."""
        axes = self.axes(side)
        if not isinstance(axes, Mapping):
            return axes
        return next((axes[name] for name in self._names(side, key) if name in axes), 0)

    def is_named(self, side: str, key: Key) -> bool:
        """Whether the user says something of this argument, output or target by itself."""
        axes = self.axes(side)
        return isinstance(axes, Mapping) and any(name in axes for name in self._names(side, key))

    def _names(self, side: str, key: Key) -> list[Key]:
        """What the user may call something: its key, and for an argument of the model both its position and its name."""
        if side != "inputs":
            return [key]
        if isinstance(key, int):
            return [key, *self.input_names[key : key + 1]]
        return [key, *([self.input_names.index(key)] if key in self.input_names else [])]

    def argument(self, key: Key, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """An argument of a call of the model, by position or name.

        Raises:
            ArgumentError: if the call has none of that name.
        """
        for name in self._names("inputs", key):
            if isinstance(name, int) and name < len(args):
                return args[name]
            if name in kwargs:
                return kwargs[str(name)]
        raise ArgumentError(f"sample_of={key!r} names no argument of this call of the model")

    def placement(self, name: str) -> Placement | None:
        """Where a module's outputs have their samples; None where nothing is said."""
        if self.modules is None:
            return None
        if not isinstance(self.modules, Mapping):
            return Placement(self.modules)
        matching = [axis for pattern, axis in self.modules.items() if fnmatchcase(name, pattern)]
        return Placement(matching[-1]) if matching else None

    @property
    def says_all_outputs(self) -> bool:
        """Whether the user says of all outputs together where their samples are, and not of some by position or key."""
        return self.says_outputs and not isinstance(self.outputs, Mapping)

    @property
    def is_of_everything(self) -> bool:
        """Whether one axis was said of every tensor: of inputs, outputs, targets and all modules' outputs."""
        return isinstance(self.modules, int) and self.inputs == self.outputs == self.targets == self.modules

    @property
    def fingerprint(self) -> Hashable:
        """The same for words that mean the same: what was found out under some holds for these alone."""
        sides = tuple([_frozen(value) for value in (*map(self.axes, SIDES), self.modules)])
        return sides, self.n_samples is not None, self.sample_of is not None


NOTHING = Told()


def told(
    model: nn.Module, batch_axis: BatchAxis = None, n_samples: NSamples = None, sample_of: SampleOf = None
) -> Told:
    """The words of a user, checked.

    Raises:
        ArgumentError: if they do not fit this model.
    """
    if n_samples is not None and not callable(n_samples):
        require_positive_int("n_samples", n_samples)
    if not (sample_of is None or isinstance(sample_of, (Tensor, str, int)) or callable(sample_of)) or sample_of is True:
        raise ArgumentError(
            "sample_of must be the sample of each row as a tensor, the position or name of the argument of the model that has "
            f"them, or a function of the model's arguments that returns them, not {described(sample_of)}"
        )
    if batch_axis is None or _is_axis(batch_axis):
        axis: Any = batch_axis or 0
        names = _input_names(model) if isinstance(sample_of, (str, int)) else ()
        return Told(axis, axis, axis, batch_axis, n_samples, sample_of, names, batch_axis is not None)
    if not isinstance(batch_axis, Mapping) or not batch_axis.keys() <= {*SIDES, "modules"}:
        raise ArgumentError(
            "batch_axis must be an int of 0 or more, or a mapping with some of the keys 'inputs', 'outputs', 'targets' and "
            f"'modules', not {described(batch_axis)}; modules' axes go by their names, as in {{'modules': {{'encoder.*': 1}}}}"
        )
    for side in SIDES:
        _require_axes(side, batch_axis.get(side, 0))
    _require_modules(model, batch_axis.get("modules"))
    names = _input_names(model)
    _require_inputs(model, batch_axis.get("inputs"), names)
    says_outputs = "outputs" in batch_axis
    return Told(**batch_axis, n_samples=n_samples, sample_of=sample_of, input_names=names, says_outputs=says_outputs)


def _is_axis(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _require_axes(side: str, axes: object) -> None:
    each = axes.values() if isinstance(axes, Mapping) else [axes]
    if not all(axis is None or axis == LIST or _is_axis(axis) for axis in each):
        raise ArgumentError(
            f"batch_axis[{side!r}] must be an axis of 0 or more, 'list' for a list with an item for each sample, None for what "
            f"all samples share, or a mapping from positions or names to such, not {described(axes)}"
        )


def _require_modules(model: nn.Module, modules: object) -> None:
    axes: Iterable[object] = modules.values() if isinstance(modules, Mapping) else [modules or 0]
    if not all(map(_is_axis, axes)):
        raise ArgumentError(
            "batch_axis['modules'] must be an axis of 0 or more, or a mapping from modules' names or patterns to such, not "
            f"{modules!r}"
        )
    known = [name for name, _ in named_modules(model)]
    patterns = modules if isinstance(modules, Mapping) else {}
    if missing := [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in known)]:
        raise ArgumentError(f"batch_axis names modules that the model lacks: {', '.join(missing)}")


def _require_inputs(model: nn.Module, axes: object, names: tuple[str, ...]) -> None:
    if not isinstance(axes, Mapping) or not names:
        return
    kinds = {p.kind for p in inspect.signature(model.forward).parameters.values()}
    known = set(inspect.signature(model.forward).parameters)
    if inspect.Parameter.VAR_KEYWORD not in kinds and (
        missing := [str(key) for key in axes if isinstance(key, str) and key not in known]
    ):
        raise ArgumentError(f"batch_axis names arguments that {type(model).__name__} lacks: {', '.join(missing)}")


def _input_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the model's positional arguments, as far as it names them."""
    try:
        found = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # A forward that is not written in Python.
        return ()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in found if p.kind in positional)


def _frozen(axes: Any) -> Hashable:
    return tuple(axes.items()) if isinstance(axes, Mapping) else axes  # Of patterns the order counts.
