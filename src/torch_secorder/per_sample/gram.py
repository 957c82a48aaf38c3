"""Gram matrices over positions, in strips of columns, and the factors that several forms share."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_secorder.autograd.precision import HALF
from torch_secorder.per_sample.budget import chunk_bytes
from torch_secorder.per_sample.profiles import DeviceProfile, profile_of


def strip_width(positions: int, profile: DeviceProfile) -> int:
    """How many columns of a Gram matrix are computed at once: a small multiple of 16 is fastest with caches, else all."""
    return min(positions, 32 if positions < 512 else 64) if profile.has_caches else positions


def cheaper_algorithm(positions: int, i: int, o: int, profile: DeviceProfile) -> str:
    """The cheaper algorithm, "gram" or "direct", for these numbers of positions and features."""
    saved, price = 1.0 if strip_width(positions, profile) == positions else 0.7, profile.price_of_a_write
    gram, direct = saved * positions**2 * (i + o + price), (positions + price) * i * o
    return "gram" if gram < direct else "direct"


class SharedFactor:
    """A factor ``[n, k, t, f]`` that several forms share, so that its Gram matrix is computed once for all of them.

    The matrix is kept as long as this object, provided that it takes no more memory than a chunk of temporaries may.
    """

    def __init__(self, value: Tensor):
        self.value = value
        self._kept: dict[tuple[int, int, int], Tensor] = {}

    def gram(self, rows: slice, start: int, stop: int) -> tuple[Tensor, bool]:
        """Columns of the matrix's lower half for some samples, and whether they are kept, so that they must not be changed."""
        n, k, t, _ = self.value.shape
        most = chunk_bytes(profile_of(self.value.device).chunk_bytes) or 0
        if n * k * t * t * self.value.dtype.itemsize > most:
            return gram_columns(self.value, rows, start, stop), False
        key = rows.start, start, stop
        if key not in self._kept:
            self._kept[key] = gram_columns(self.value, rows, start, stop)
        return self._kept[key], True


def gram_columns(x: Tensor, rows: slice, start: int, stop: int) -> Tensor:
    """Columns of the lower half of the Gram matrices of some samples, ``[n k, t - start, columns]``."""
    # Of small layers a view takes as long as the product, so that none is made of what is needed as a whole.
    x = (x if rows == slice(0, len(x)) else x[rows]).flatten(0, 1)
    right = x if not start and stop >= x.shape[1] else x[:, start:stop]
    return matrix_products(x[:, start:] if start else x, right.mT)


def matrix_products(x: Tensor, y: Tensor) -> Tensor:
    """Products of matrices, ``[n, ...]``; products of numbers in half precision are exact, and are added up in float32."""
    return torch.bmm(x, y, out_dtype=torch.float32) if x.dtype in HALF else torch.bmm(x, y)
