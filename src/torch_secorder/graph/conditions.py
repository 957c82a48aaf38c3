"""What a walk may say of its graph: whether shapes are ambiguous, and whether samples change their order."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

REORDERS = {
    f"{name}Backward0"
    for name in [
        "Index",
        "IndexSelect",
        "Flip",
        "Roll",
        "Gather",
        "IndexPut",
        "IndexAdd",
        "Scatter",
        "ScatterAdd",
        "Sort",
    ]
}


# (Step after step has the same shapes.)
@lru_cache(64)
def size_pattern(n: int, shapes: tuple[tuple[int, ...], ...]) -> int:
    """Of shapes with each size as the number of different ones before it."""
    sizes = {n: 0}
    return hash(tuple([tuple([sizes.setdefault(size, len(sizes)) for size in shape]) for shape in shapes]))


@lru_cache(64)
def has_ambiguous_axis(n: int, shapes: tuple[tuple[int, ...], ...]) -> bool:
    """Whether some shape has n indices on another axis than the first."""
    return any(n in shape[1:] for shape in set(shapes))


def _axes(node: Any) -> tuple[str, ...]:
    """The axes that a node works along, as far as it saved any."""
    kinds = _axis_names(type(node))  # type: ignore[arg-type]  # a type is hashable
    return tuple([str(getattr(node, name)) for name in kinds]) if kinds else ()


@cache
def _axis_names(kind: type) -> list[str]:
    return [name for name in ("_saved_dim", "_saved_dims", "_saved_dim0", "_saved_dim1") if hasattr(kind, name)]


def _reorders(node: Any, n: int) -> bool:
    """Whether a node that picks entries does so on the first axis, in another order than the given one."""
    name = node.name()
    if name == "FlipBackward0":
        return any(axis % len(node._input_metadata[0].shape) == 0 for axis in node._saved_dims)
    if name == "IndexBackward0":
        first = node._saved_indices[0]
        return first is not None and not _in_order(first, n)
    if name == "IndexSelectBackward0":
        return node._saved_dim == 0 and not _in_order(node._saved_index, n)
    return True


def _in_order(index: Tensor, n: int) -> bool:
    return index.shape == (n,) and bool((index == torch.arange(n, device=index.device)).all())
