"""Nested tensors of the jagged layout, ``[n, own length, ...]``: samples of different lengths in one tensor.

Rules see them padded with zeros, which is exact where the gradient is padded too: a position without a gradient adds nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_secorder.model.ranks import full_tensor


def whole(x: Any) -> Any:
    """A tensor that is in parts on several ranks, or nested, as one plain tensor; anything else as it is."""
    x = full_tensor(x)
    return torch.nested.to_padded_tensor(x, 0.0) if isinstance(x, Tensor) and x.is_nested else x


def whole_shape(x: Tensor) -> torch.Size:
    """The shape of :func:`whole`."""
    if not x.is_nested:
        return x.shape
    n, _, *others = x.shape
    return torch.Size([n, int(_lengths(x).max()), *others])


def shows_sizes(x: Tensor) -> bool:
    """Whether a tensor has a shape, as all have but nested ones of torch's first layout."""
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
    """``x.select(axis, n)``, also of a nested tensor, whose samples are on the first axis."""
    return x.unbind()[n] if x.is_nested else x.select(axis, n)


def _lengths(x: Tensor) -> Tensor:
    return _offsets(x).diff()


def _offsets(x: Tensor) -> Tensor:
    found: Tensor = x.offsets()  # type: ignore[attr-defined]  # a method of nested tensors
    return found
