"""Tensors in nested containers: what models take and return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in nested mappings, sequences and dataclasses, in order."""
    found: list[Tensor] = []
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, Mapping):
            pending.extend(reversed(list(item.values())))
        elif isinstance(item, (list, tuple)):
            pending.extend(reversed(item))
        elif is_dataclass(item) and not isinstance(item, type):
            pending.extend([getattr(item, f.name) for f in reversed(fields(item))])
    return found


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``function`` of every tensor in nested mappings, sequences and dataclasses."""
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
    """Where a tensor counts n samples: on ``axis``, else on the first as labels do, else nowhere."""
    return next((a for a in (axis, 0) if x.dim() > a and x.shape[a] == n), None)


def rows(value: Any, index: list[int], n: int, axis: int = 0) -> Any:
    """Those samples of every tensor in ``value`` that counts n of them, in memory of their own."""

    def picked(x: Tensor) -> Tensor:
        where = sample_axis(x, n, axis)
        # (Large rows are copied several times faster so than by index_select.)
        return x if where is None else torch.cat([x.narrow(where, i, 1) for i in index], where)

    return mapped(picked, value)


def shrunk(x: Tensor) -> Tensor:
    """Other values of the same kind: probabilities stay probabilities."""
    if not x.is_floating_point():
        return x
    return x * torch.linspace(0.5, 1.0, max(x.numel(), 1), device=x.device, dtype=x.dtype)[: x.numel()].view(x.shape)
