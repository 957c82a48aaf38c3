"""What a graph leaves open: whether its shapes are ambiguous, and whether its samples change their order."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from torch_secorder.autograd.nodes import value_shape
from torch_secorder.autograd.saved import knows, saved

# Nodes that may put samples into another order.
_NAMES = "Index IndexSelect Flip Roll Gather IndexPut IndexAdd Scatter ScatterAdd Sort"
REORDERS = {f"{name}Backward0" for name in _NAMES.split()}


# Both are remembered, since step after step has the same shapes.
@lru_cache(64)
def size_pattern(n: int, shapes: tuple[tuple[int, ...], ...]) -> int:
    """A hash of which sizes in these shapes equal each other, and which equal n; other batch sizes give the same one."""
    sizes = {n: 0}
    return hash(tuple([tuple([sizes.setdefault(size, len(sizes)) for size in shape]) for shape in shapes]))


@lru_cache(64)
def has_ambiguous_axis(n: int, shapes: tuple[tuple[int, ...], ...]) -> bool:
    """Whether some shape has n indices on another axis than the first."""
    return any(n in shape[1:] for shape in set(shapes))


def reorders_first_axis(node: Any, n: int) -> bool:
    """Whether one of these nodes works on the first axis, and not in the order that is there already.

    Where that can't be told, it may.
    """
    name = node.name()
    if name == "FlipBackward0" and knows(name, "axes"):
        return any(axis % len(value_shape(node, 0)) == 0 for axis in saved(node, "axes"))
    if name == "IndexBackward0" and knows(name, "indices"):
        first = saved(node, "indices")[0]
        return first is not None and not _in_order(first, n)
    if name == "IndexSelectBackward0" and knows(name, "axis", "index"):
        return saved(node, "axis") == 0 and not _in_order(saved(node, "index"), n)
    return True


def _in_order(index: Tensor, n: int) -> bool:
    return index.shape == (n,) and bool((index == torch.arange(n, device=index.device)).all())
