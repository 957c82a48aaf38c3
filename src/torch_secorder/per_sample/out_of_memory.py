"""What happens when memory runs out: fewer samples are taken at a time, and if even one is too many, a refusal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from torch_secorder.errors import CurvatureError, OutOfMemoryError
from torch_secorder.per_sample._base import PerSampleGradient
from torch_secorder.per_sample.dense_answers import Unguarded

Answer = TypeVar("Answer")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed; for a CPU, torch has only the error's text for that."""
    if isinstance(error, CurvatureError):
        return False
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "can't allocate memory" in str(error)


def as_refusal(error: Exception) -> Exception:
    """The error itself, or, if memory ran out, a refusal that names the remedy."""
    if not out_of_memory(error):
        return error
    refusal = OutOfMemoryError(
        f"no memory for taking the gradients of this batch apart by samples, even a sample at a time ({str(error)[:200]}); the "
        "batch is left out and the gradients in .grad are complete: use smaller batches, or keep less (diagonal=False, "
        "per_sample=False, activations=False)"
    )
    refusal.__cause__ = error.with_traceback(None)  # the traceback's frames hold what was allocated
    return refusal


def halving_on_oom(
    form: PerSampleGradient,
    question: Callable[[PerSampleGradient], Answer],
    together: Callable[[Answer, Answer], Answer],
) -> Answer:
    """``question(form)``; if memory runs out, ``together`` of the answers for both halves of the samples."""
    try:
        return question(form)
    except Exception as error:
        if form.n == 1 or not out_of_memory(error):
            raise
    # Here and not in the except clause, where the error holds all that was allocated.
    half = form.n // 2
    first, second = (
        halving_on_oom(form.select(part), question, together) for part in (slice(0, half), slice(half, form.n))
    )
    return together(first, second)


def squared_norms_of(form: PerSampleGradient) -> Tensor:
    """A form's squared norms; if memory runs out, for halves of the samples at a time."""
    try:
        return form.squared_norm()
    except Exception as error:
        if form.n == 1 or not out_of_memory(error):
            raise
    # Here and not in the except clause, where the error holds all that was allocated.
    return halving_on_oom(form, lambda part: part.squared_norm(), _both)


def squared_norms_of_each(forms: Mapping[str, PerSampleGradient]) -> dict[str, Tensor]:
    """The squared norms of several forms, by their names."""
    found: dict[str, Tensor] = {}
    try:
        for name, form in forms.items():
            found[name] = form.squared_norm()
    except Exception as error:
        if not out_of_memory(error):
            raise
    # Here and not in the except clause, where the error holds all that was allocated.
    return found if len(found) == len(forms) else {name: squared_norms_of(form) for name, form in forms.items()}


def direct_squared_norms_of(form: PerSampleGradient) -> Tensor:
    """A form's squared norms from the gradients themselves, in which no digits cancel."""
    return halving_on_oom(form, lambda part: part.dense_squared_norm(), _both)


def norms_of(form: PerSampleGradient) -> Tensor | None:
    """A form's norms, to be squared later for all parameters at once; None if the form computes the squares directly."""
    return halving_on_oom(form, lambda part: part.norms(), _both_norms)


def unguarded_squared_norms_of(form: PerSampleGradient) -> Unguarded:
    """A form's squared norms before any check for cancelled digits, and the sizes of the summands."""
    return halving_on_oom(form, lambda part: part.unguarded_squared_norm(), _both_unguarded)


def _both(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a, b])


def _both_norms(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else _both(a, b)


def _both_unguarded(first: Unguarded, second: Unguarded) -> Unguarded:
    (norms, sizes), (more_norms, more_sizes) = first, second
    if sizes is None and more_sizes is None:
        return torch.cat([norms, more_norms]), None
    # If nothing can cancel in a half, its sizes are its norms.
    sizes, more_sizes = norms if sizes is None else sizes, more_norms if more_sizes is None else more_sizes
    return torch.cat([norms, more_norms]), torch.cat([sizes, more_sizes])
