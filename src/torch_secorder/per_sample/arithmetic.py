"""Operations on plain tensors: their precision, sums over rows, and products with one direction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from torch_secorder.autograd.precision import HALF
from torch_secorder.autograd.product_bits import BF16, DOUBLE, SINGLE, TF32, product_bits

# Dtypes that need no widening, as in most layers of most models.
FULL = (torch.float32, torch.float64)


def at_least_float32(value: Tensor) -> Tensor:
    """``value`` in at least float32: squares of half-precision numbers overflow and underflow."""
    if value.dtype == torch.complex32:
        return value.to(torch.complex64)
    return value.float() if value.dtype in HALF else value


def real_entries(value: Tensor) -> Tensor:
    """Real numbers as they are, and complex ones as pairs of real numbers along one more axis."""
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def one_direction(value: Tensor) -> Tensor:
    """Real numbers as they are, and the sum of the two parts of complex ones."""
    return value.real + value.imag if value.is_complex() else value


def sum_over(value: Tensor, axes: Sequence[int], *, keepdim: bool = False) -> Tensor:
    """The sum over ``axes``, in at least float32: in half precision it would be rounded, and might overflow."""
    return value.sum(list(axes), keepdim=keepdim, dtype=torch.float32 if value.dtype in HALF else None)


# How far off a Gram sum may be: a tenth of what the library promises in float32 and float64, and the rounding error of one
# product if products have fewer bits.
_OFF = {DOUBLE: 1e-9, SINGLE: 1e-5, TF32: 1e-2, BF16: 5e-2}


def cancellation_floor(like: Tensor) -> float:
    """The fraction of its terms' summed magnitudes below which a sum with signs has lost too many digits.

    A Gram sum is off by about ``4 eps`` of the sum of its diagonal. Demanding 1e-5 (float32) or 1e-9 (float64) gives the
    fractions 0.05 and 1e-6.

    Args:
        like: a tensor of the dtype and on the device of the sum.
    """
    bits = DOUBLE if like.dtype == torch.float64 else product_bits(like.device.type, convolves=False)
    return 4 * 2.0 ** (1 - bits) / _OFF[bits]


def joined(parts: Iterable[Tensor]) -> Tensor:
    """All parts concatenated; a single part is returned as it is, since a copy takes time."""
    first, *others = parts
    return torch.cat([first, *others]) if others else first


def total_of(values: Iterable[Tensor]) -> Tensor:
    """The sum of some tensors, at least one, each of which is made when the one before is added, so that few take memory."""
    rest = iter(values)
    total = next(rest)
    for value in rest:
        total = total + value
    return total


def in_rows(value: Tensor) -> Tensor:
    """``[n, *shape]`` as ``[n, elements]``, even if a sample has one number, or none."""
    return value[:, None].flatten(1)


def zeroed(value: Tensor, lost: Tensor) -> Tensor:
    """``[n, ...]`` with zeros for the samples that are lost, whatever was there: a product with zero would keep NaN."""
    return value.masked_fill(lost.view(-1, *[1] * (value.dim() - 1)), 0)


def sign_vectors(shape: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Random signs ``left`` and ``right``, as real numbers, for :meth:`PerSampleGradient.along`; one shape always gets the same.

    ``left right^T`` is a direction in the space of a parameter whose shape is read as ``(left, right)``.
    """
    return _sign_vectors(shape[0] if shape else 1, math.prod(shape[1:]), like.dtype.to_real(), like.device)


@lru_cache(32)
def _sign_vectors(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    left, right = (2 * torch.randint(2, (side,), generator=generator, device="cpu") - 1 for side in (rows, columns))
    return left.to(device, dtype), right.to(device, dtype)


# A CPU's norm adds one square after the other. In float32 a row of thousands keeps its digits, one of millions does not. An
# NVIDIA GPU has hundreds of sums, which it adds in pairs; other devices were not tried.
LONG = 4096


def squared_norm_of_rows(value: Tensor) -> Tensor:
    """``sum of |x| ** 2`` over the last axis."""
    if value.is_complex():
        return squared_norm_of_rows(real_entries(value).flatten(-2))
    # For large rows a norm is faster, since it writes nothing; but it has no second derivative at zero.
    if value.numel() <= 2**16 or torch.is_grad_enabled():
        return torch.linalg.vecdot(value, value)
    if value.shape[-1] <= LONG or value.is_cuda:
        return torch.linalg.vector_norm(value, dim=-1).square()
    even = value.shape[-1] // LONG * LONG
    squares = torch.linalg.vector_norm(value[..., :even].unflatten(-1, (-1, LONG)), dim=-1).square().sum(-1)
    return squares + torch.linalg.vector_norm(value[..., even:], dim=-1).square()


# From this many columns on, adding the squares of one row after the other to a total that stays in the caches is faster on a CPU
# than writing the squares of all rows first; measured on one core, it takes half the time.
WIDE = 2**15
# Rows that are added up one after the other, each off by 2^-24 of the sum at most.
MOST_ROWS = 64


def squares_of_columns(rows: Tensor) -> Tensor:
    """The sum of ``x ** 2`` over the rows of ``[rows, columns]``, of real numbers."""
    if rows.device.type != "cpu" or rows.shape[1] < WIDE or len(rows) > MOST_ROWS:
        return rows.square().sum(0)
    first, *others = rows
    total = first.square()
    for row in others:
        total.addcmul_(row, row)
    return total


def squared_norms_along(value: Tensor, axis: int) -> Tensor:
    """``sum of x ** 2`` over one axis of real numbers, which may lie in memory in any order."""
    if torch.is_grad_enabled() or value.shape[axis] > LONG:
        return value.square().sum(axis)
    return torch.linalg.vector_norm(value, dim=axis).square()


def zero_squared_norms(n: int, gradient: Tensor) -> Tensor:
    """The squared norms of n samples whose gradients are zero, ``[n]``: real numbers, also where the gradients are complex."""
    # A nested tensor makes none of another shape.
    like = gradient.values() if gradient.is_nested else gradient
    return at_least_float32(like.new_zeros(n, dtype=gradient.dtype.to_real()))
