"""Nested tensors of the jagged layout, ``[n, own length, ...]``: samples of different lengths in one tensor.

Rules get them padded with zeros. That is exact, since the gradient is padded, too, and a position without a gradient adds
nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_secorder.model.ranks import full_tensor


def whole(x: Any) -> Any:
    """A sharded or nested tensor as one plain tensor; anything else is returned as it is."""
    x = full_tensor(x)
    return torch.nested.to_padded_tensor(x, 0.0) if isinstance(x, Tensor) and x.is_nested else x


def whole_shape(x: Tensor) -> torch.Size:
    """The shape of :func:`whole`."""
    if not x.is_nested:
        return x.shape
    n, _, *others = x.shape
    return torch.Size([n, int(_lengths(x).max()), *others])


def shows_sizes(x: Tensor) -> bool:
    """Whether a tensor has a shape; only nested ones of torch's strided layout have none."""
    return not x.is_nested or x.layout == torch.jagged


def sample_rows(x: Tensor) -> Tensor:
    """The sample of each row of a nested tensor's values."""
    return torch.arange(len(x), device=x.device).repeat_interleave(_lengths(x))


def with_values(x: Tensor, values: Tensor) -> Tensor:
    """A nested tensor of the same structure with other values."""
    return torch.nested.nested_tensor_from_jagged(values, _offsets(x))


def with_rows(x: Tensor, rows: dict[int, Tensor]) -> Tensor:
    """A nested tensor in which some samples' rows are replaced."""
    parts = [rows.get(n, own) for n, own in enumerate(x.unbind())]
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


def select(x: Tensor, axis: int, n: int) -> Tensor:
    """``x.select(axis, n)``, also for a nested tensor, whose samples are on the first axis."""
    return x.unbind()[n] if x.is_nested else x.select(axis, n)


def _lengths(x: Tensor) -> Tensor:
    return _offsets(x).diff()


def _offsets(x: Tensor) -> Tensor:
    found: Tensor = x.offsets()  # type: ignore[attr-defined]  # a method of nested tensors
    return found
