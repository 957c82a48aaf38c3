"""What arguments may be: one place for every check of a choice, a number, a function or a scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from torch_secorder.errors import ArgumentError

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


def require_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise ArgumentError unless ``value`` is one of the allowed ones."""
    if not isinstance(value, (str, type(None))) or value not in allowed:
        raise ArgumentError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")


def require_positive_int(name: str, value: object) -> int:
    """``value``, if it is an int of at least 1.

    Raises:
        ArgumentError: otherwise; a bool is no int here.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name} must be an int >= 1, not {value!r}")
    return value


def require_callable(name: str, value: Any) -> None:
    """Raise unless ``value`` can be called.

    Raises:
        ArgumentError: naming the argument.
    """
    if isinstance(value, type) and issubclass(value, nn.Module):
        raise ArgumentError(f"{name} is the class {value.__name__}: pass an instance of it, {value.__name__}()")
    if not callable(value):
        raise ArgumentError(f"{name} must be a module or a function of (outputs, targets), not {value!r:.80}")


def require_model_before_loss(model: Any, loss_fn: Any) -> None:
    """Raise if the two have probably changed places: the model has no parameters, and the loss has some.

    Raises:
        ArgumentError: saying so.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, not {model!r:.80}")
    swapped = isinstance(loss_fn, nn.Module) and any(True for _ in loss_fn.parameters())
    if swapped and not any(True for _ in model.parameters()):
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
    if isinstance(max_memory, bool) or not isinstance(max_memory, int) or max_memory < 1:
        raise ArgumentError(f"max_memory must be a number of bytes, an int >= 1, or None, not {max_memory!r}")
    return max_memory


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


def require_share(amount: float, name: str = "amount") -> float:
    """A share from 0 to 1.

    Raises:
        ArgumentError: for anything else.
    """
    if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not 0 <= amount <= 1:
        raise ArgumentError(f"{name} must be a share from 0 to 1, not {amount!r}")
    return float(amount)
