"""Errors for arguments that seem to be in each other's place, raised once the model has failed on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import OutOfMemoryError, Tensor

from torch_secorder.errors import ArgumentError, CurvatureError


@contextmanager
def explaining_misplaced(inputs: Any, targets: Any) -> Iterator[None]:
    """A block in which an error of the model or the loss is blamed on the arguments if they look misplaced.

    Raises:
        ArgumentError: naming what was probably meant, with the error as its cause.
    """
    try:
        yield
    except (CurvatureError, OutOfMemoryError):
        raise
    except Exception as error:
        guess = _guess(inputs, targets)
        if not guess:
            raise
        raise ArgumentError(f"{guess} ({type(error).__name__}: {error!s:.200})") from error


def _guess(inputs: Any, targets: Any) -> str:
    if not isinstance(inputs, Tensor):
        return ""
    if inputs.grad_fn is not None:
        return (
            f"the model does not run on the inputs of shape {tuple(inputs.shape)}, which were computed from parameters: if they "
            "are its outputs, pass what the model takes instead, since it is run here"
        )
    numbers_for_indices = not inputs.is_floating_point() and isinstance(targets, Tensor) and targets.is_floating_point()
    if isinstance(targets, Tensor) and (numbers_for_indices or inputs.dim() < targets.dim()):
        return (
            f"the model does not run on inputs of shape {tuple(inputs.shape)} and {inputs.dtype} with targets of shape "
            f"{tuple(targets.shape)} and {targets.dtype}, which seem to have changed places: inputs come before targets"
        )
    return ""
