"""Tensors in nested containers, as models take and return them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch_secorder.model.nested import with_values


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in nested mappings, sequences and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[Tensor]) -> None:
    """Append every tensor in a container to ``found``. A generator would take a Python call for each tensor and each level."""
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
    if isinstance(value, Mapping):
        items = {key: mapped(function, item) for key, item in value.items()}
        kind: Any = type(value)
        return kind(**items) if is_dataclass(value) else kind(items)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: mapped(function, getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(function, item) for item in value))
    return type(value)(mapped(function, item) for item in value) if isinstance(value, (list, tuple)) else value


def sample_axis(x: Tensor, n: int, axis: int = 0) -> int | None:
    """The axis on which a tensor counts n samples: ``axis``, else the first one, as for labels; None if it counts none."""
    return next((a for a in (axis, 0) if x.dim() > a and x.size(a) == n), None)


def rows(value: Any, index: list[int], n: int, axis: int = 0) -> Any:
    """The samples in ``index`` of every tensor in ``value`` that counts n of them, copied; other tensors as they are."""

    def picked(x: Tensor) -> Tensor:
        where = sample_axis(x, n, axis)
        if x.is_nested and where is not None:
            parts = x.unbind()
            return torch.nested.as_nested_tensor([parts[i] for i in index], layout=x.layout)
        # Copying large rows one by one is several times faster than index_select.
        return x if where is None else torch.cat([x.narrow(where, i, 1) for i in index], where)

    return mapped(picked, value)


def is_continuous(x: Tensor) -> bool:
    """Whether a tensor has real or complex numbers, in which something may have a gradient."""
    return x.is_floating_point() or x.is_complex()


def shrunk(x: Tensor) -> Tensor:
    """Other values of the same kind, for comparison: entries become smaller, so that probabilities stay probabilities."""
    if not is_continuous(x):
        return x
    if x.is_nested:
        return with_values(x, shrunk(x.values()))
    factors = torch.linspace(0.5, 1.0, max(x.numel(), 1), device=x.device, dtype=x.dtype.to_real())
    return x * factors[: x.numel()].view(x.shape)
