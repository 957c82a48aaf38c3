"""The tensors in nested containers, as models take and return them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from torch_secorder.model.nested import with_values

Key = int | str  # of a part of a container: a position, or the name of a field or an entry


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in nested mappings, sequences and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[Tensor]) -> None:
    """Append every tensor in a container to ``found``; a generator would cost a Python call for each tensor and level."""
    items: Iterable[Any] = ()
    if isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, (list, tuple)):
        items = value
    elif is_dataclass(value) and not isinstance(value, type):
        items = [getattr(value, f.name) for f in fields(value)]
    for item in items:
        if isinstance(item, Tensor):
            found.append(item)
        else:
            _collect(item, found)


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nested mappings, sequences and dataclasses, with ``function`` applied to every tensor in them."""
    if isinstance(value, Tensor):
        return function(value)
    return with_parts(lambda _, part: mapped(function, part), value)


def copied(value: Any) -> Any:
    """The same, with copies of the tensors that require no gradient, for code that may change them in place.

    Tuples, lists and dictionaries are looked into, but nothing of the user's own classes.
    """
    if isinstance(value, Tensor):
        is_plain = value.layout is torch.strided and not value.is_nested
        return value.clone() if is_plain and not value.requires_grad else value
    if type(value) in (tuple, list):
        return type(value)(map(copied, value))
    return {key: copied(item) for key, item in value.items()} if type(value) is dict else value


def parts(value: Any) -> list[tuple[Key, Any]]:
    """The parts of a container, each with its key, field or position; a tensor is the only part of itself."""
    if isinstance(value, Mapping):
        return list(value.items())
    if is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name)) for f in fields(value)]
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    return [(0, value)] if isinstance(value, Tensor) else []


def keyed_tensors(value: Any) -> list[tuple[Key, Tensor]]:
    """The tensors of a container, each with the key, field or position of the part that has it."""
    return [(key, x) for key, part in parts(value) for x in tensors(part)]


def with_parts(function: Callable[[Key, Any], Any], value: Any) -> Any:
    """The same container with ``function(key, part)`` in place of each part; anything else is returned as it is."""
    if isinstance(value, Mapping):
        items = {key: function(key, item) for key, item in value.items()}
        kind: Any = type(value)
        return kind(**items) if is_dataclass(value) else kind(items)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: function(f.name, getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(function(number, item) for number, item in enumerate(value)))
    if isinstance(value, (list, tuple)):
        return type(value)(function(number, item) for number, item in enumerate(value))
    return value


def is_packed(value: Any) -> bool:
    """Whether something is a packed sequence, which is one argument though it is a tuple."""
    return isinstance(value, PackedSequence)


def packed_sequences(value: Any) -> list[PackedSequence]:
    """Every packed sequence in nested containers."""
    if isinstance(value, PackedSequence):
        return [value]
    if isinstance(value, Tensor):
        return []
    return [packed for _, part in parts(value) for packed in packed_sequences(part)]


def is_continuous(x: Tensor) -> bool:
    """Whether a tensor has real or complex numbers, so that it may have a gradient."""
    return x.is_floating_point() or x.is_complex()


def shrunk(x: Tensor) -> Tensor:
    """Other values of the same kind, for comparison; they are smaller, so that probabilities stay probabilities."""
    if not is_continuous(x):
        return x
    if x.is_nested:
        return with_values(x, shrunk(x.values()))
    return x * evenly_spaced(x, 0.5, 1.0)


# How many numbers are evenly spaced before they repeat. It is prime, so that rows of no length have the same ones.
PERIOD = 65_521


def evenly_spaced(x: Tensor, low: float, high: float) -> Tensor:
    """Evenly spaced numbers from low to high in the shape of a tensor; a tensor of integers is returned as it is."""
    if not is_continuous(x):
        return x
    if x.is_nested:
        return with_values(x, evenly_spaced(x.values(), low, high))
    count = x.numel()
    steps = torch.linspace(low, high, min(max(count, 1), PERIOD), device=x.device, dtype=x.dtype.to_real())
    return steps.repeat(-(-count // len(steps)))[:count].view(x.shape).to(x.dtype)
