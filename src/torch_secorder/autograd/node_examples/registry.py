"""The registry of the examples, and the tensors that they are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# An output that such a node made, and what the node must have saved, by our names. None stands for any tensor.
Example = tuple[Tensor, dict[str, Any]]
EXAMPLES: dict[str, Callable[[], Example]] = {}


def example(kind: str) -> Callable[[Callable[[], Example]], Callable[[], Example]]:
    """Registers a function that makes a node of this kind."""

    def register(made: Callable[[], Example]) -> Callable[[], Example]:
        EXAMPLES[kind] = made
        return made

    return register


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Different numbers around 0, of a tensor that requires a gradient."""
    count = math.prod(shape)
    x = torch.arange(count, dtype=dtype, device="cpu").sub(count / 2 - 0.25).div(count).reshape(shape)
    return x.requires_grad_()


def indices(*values: int) -> Tensor:
    """Indices in one row."""
    return torch.tensor(values, device="cpu")
