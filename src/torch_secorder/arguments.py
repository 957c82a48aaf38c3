"""What arguments may be: one place for every check of a choice, a number, a function or a scale."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from difflib import get_close_matches
from functools import wraps
from numbers import Integral, Real
from types import FunctionType
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from torch_secorder.errors import ArgumentError, CallError

P = ParamSpec("P")
R = TypeVar("R")

# The choices of public arguments, which type checkers see; `require_choice` tells everybody else.
Reduction: TypeAlias = Literal["mean", "sum"]
MonitorFisher: TypeAlias = Literal["empirical", "sampled", "observed"]
Fisher: TypeAlias = Literal["empirical", "exact", "sampled", "observed"]
LossType: TypeAlias = Literal["nll", "bce", "mse", "poisson"]
Labels: TypeAlias = Literal["model", "observed"]
OnError: TypeAlias = Literal["raise", "skip"]
RepeatedCalls: TypeAlias = Literal["same", "new"]
Scheme: TypeAlias = Literal["symmetric", "affine"]
Grain: TypeAlias = Literal["tensor", "channel", "group"]
Scope: TypeAlias = Literal["global", "layer"]
By: TypeAlias = Literal["module", "type"] | Callable[[str], object] | None
DiagonalSums: TypeAlias = Literal["full", "rows", "columns"]
DiagonalLayout: TypeAlias = bool | Mapping[str, DiagonalSums]
ErrorOf: TypeAlias = Literal["total", "rows"]
BudgetUnit: TypeAlias = Literal["bits per weight", "bytes", "bits"]
RankUnit: TypeAlias = Literal["rank", "parameters"]
LossMean: TypeAlias = Literal["batch", "sequence", "sum"]
WeightSelection: TypeAlias = Literal["weights", "all"] | Callable[[str], bool]
Side: TypeAlias = Literal["output", "input"]

# From outputs and targets to a scalar; "model" is the word for the loss that the model computes itself.
Loss: TypeAlias = Callable[[Any, Any], Tensor] | Literal["model"]


def called_as(usage: str, options: Collection[str] = (), **instead: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator for a public function: a call that doesn't fit its arguments is told how to write it.

    Args:
        usage: what follows "write" in the message.
        options: the names of what its ``**options`` takes.
        instead: for names of arguments that it doesn't have, but people try, what to do.
    """

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        names = {*(p.name for p in named), *options}
        by_place = [p.name for p in named if p.kind is not p.KEYWORD_ONLY]
        needed = {p.name for p in named if p.default is p.empty}

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            placed, fit = by_place[: len(args)], len(args) <= len(by_place) and kwargs.keys() <= names
            if fit and kwargs.keys().isdisjoint(placed) and needed <= {*placed, *kwargs}:
                return function(*args, **kwargs)
            unknown = next((name for name in kwargs if name not in names), None)
            try:
                problem = "" if unknown is None else f"it has no argument {unknown!r}"
                signature.replace(parameters=named).bind(*args, **{k: v for k, v in kwargs.items() if k not in options})
            except TypeError as error:
                problem = problem or str(error)
            if problem:
                name = function.__qualname__.removesuffix(".__init__")
                raise CallError(f"{name}: {problem}: {_remedy(unknown, names, instead, usage)}")
            return function(*args, **kwargs)

        return call

    return decorated


def _remedy(unknown: str | None, names: Collection[str], instead: Mapping[str, str], usage: str) -> str:
    if unknown is None:
        return f"write {usage}"
    if unknown in instead:
        return instead[unknown]
    near = get_close_matches(unknown, names, 1)
    return f"do you mean {near[0]}=?" if near else f"write {usage}"


def described(value: object) -> str:
    """A value in few words, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, FunctionType):
        return "a lambda" if value.__name__ == "<lambda>" else f"the function {value.__name__}"
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"an object of the type {type(value).__name__}"


def require_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise ArgumentError unless ``value`` is one of the allowed ones."""
    if not isinstance(value, (str, type(None))) or value not in allowed:
        raise ArgumentError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {described(value)}")


def require_positive_int(name: str, value: object) -> int:
    """``value``, if it is an int of at least 1.

    Raises:
        ArgumentError: otherwise; a bool is no int here.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ArgumentError(f"{name} must be an int >= 1, not {value!r}")
    return int(value)


def require_loss(loss_fn: Any, or_model: str = "") -> None:
    """Raise unless a loss function can be called.

    Args:
        loss_fn: what was given.
        or_model: what else may be given, for the message.

    Raises:
        ArgumentError: saying what to pass.
    """
    if isinstance(loss_fn, type) and issubclass(loss_fn, nn.Module):
        raise ArgumentError(f"loss_fn is the class {loss_fn.__name__}: pass an instance of it, {loss_fn.__name__}()")
    if not callable(loss_fn):
        raise ArgumentError(
            f"loss_fn must be a module or a function of (outputs, targets){or_model}, not {described(loss_fn)}"
            f"{_where_it_belongs(loss_fn)}"
        )


def _where_it_belongs(value: Any) -> str:
    """What to do about something that was given in the place of a loss function."""
    if isinstance(value, Tensor) and not value.dim():
        return ", which seems to be a loss that was computed already: pass the function that computes it"
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        return ""
    return ", which seems to be data: the loss function comes before it, as in (model, loss_fn, data)"


def require_model(model: Any) -> None:
    """Raise unless a model is one.

    Raises:
        ArgumentError: saying what to pass.
    """
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type) and issubclass(model, nn.Module):
        remedy = f": pass an instance of it, {model.__name__}(...)"
    elif isinstance(model, (torch.optim.Optimizer, Iterator)):
        remedy = ": pass the model itself, and say with parameters= which of its parameters count"
    else:
        remedy = ""
    raise ArgumentError(f"model must be a torch.nn.Module, not {described(model)}{remedy}")


def require_model_before_loss(model: Any, loss_fn: Any) -> None:
    """Raise if the two have probably changed places: the model has no parameters, and the loss has some.

    Raises:
        ArgumentError: saying so.
    """
    has_parameters = isinstance(loss_fn, nn.Module) and any(True for _ in loss_fn.parameters())
    if has_parameters and callable(model) and not isinstance(model, (nn.Module, type)):
        raise ArgumentError(
            f"model must be a torch.nn.Module, not {described(model)}, and loss_fn is a {type(loss_fn).__name__} with "
            "parameters: pass the model first, then the loss"
        )
    require_model(model)
    if has_parameters and not any(True for _ in model.parameters()):
        raise ArgumentError(
            f"the model is a {type(model).__name__} without parameters, and loss_fn a {type(loss_fn).__name__} with some: "
            "pass the model first, then the loss"
        )


def fresh_generator(generator: torch.Generator | None) -> torch.Generator:
    """The given generator, or one of its own with a fresh seed, so that the global random state is left alone."""
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    if not isinstance(generator, torch.Generator):
        raise ArgumentError(f"generator must be a torch.Generator, not {generator!r}")
    return generator


def require_max_memory(max_memory: object) -> int | None:
    """``max_memory``, if it is None or a number of bytes.

    Raises:
        ArgumentError: otherwise.
    """
    if max_memory is None:
        return None
    if isinstance(max_memory, bool) or not isinstance(max_memory, Integral) or max_memory < 1:
        raise ArgumentError(f"max_memory must be a number of bytes, an int >= 1, or None, not {max_memory!r}")
    return int(max_memory)


def loss_scale_value(loss_scale: float | Tensor | Callable[[], float | Tensor]) -> float:
    """The positive number that a loss scale is, or that the function returns which is one.

    Raises:
        ArgumentError: for anything else.
    """
    value = loss_scale() if callable(loss_scale) else loss_scale
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    # Squares are divided by its square, which has to be a number.
    if not 1e-100 <= number <= 1e100:
        raise ArgumentError(
            f"loss_scale must be a positive number from 1e-100 to 1e100, or a function that returns one, not {value!r}"
        )
    return number


def is_number(value: object) -> bool:
    """Whether something is a real number, one of NumPy's too; a bool is none here."""
    return isinstance(value, Real) and not isinstance(value, bool)


def require_share(amount: float, name: str = "amount") -> float:
    """A share from 0 to 1.

    Raises:
        ArgumentError: for anything else.
    """
    if not is_number(amount) or not 0 <= amount <= 1:
        raise ArgumentError(f"{name} must be a share from 0 to 1, not {amount!r}")
    return float(amount)
