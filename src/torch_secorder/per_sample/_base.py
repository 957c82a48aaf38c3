"""The algebra's contract, and its two forms without structure: a dense tensor and a sum of unlike terms."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from torch_secorder.autograd.precision import HALF
from torch_secorder.batch_axis.placement import Grouping
from torch_secorder.per_sample.budget import chunk_bytes

Index = slice | Tensor

# Temporaries of this size stay in the last-level cache of common machines and are reused by the allocator.
CHUNK_BYTES = 8 * 2**20


def at_least_float32(value: Tensor) -> Tensor:
    """``value`` in at least float32: squares of half-precision numbers overflow and underflow."""
    return value.float() if value.dtype in HALF else value


def chunks(n: int, bytes_per_sample: float, usual: int | None = CHUNK_BYTES) -> Iterator[slice]:
    """Slices of 0..n, each with as many samples as fit into the budget, ``usual`` bytes or fewer, but at least one."""
    budget = chunk_bytes(usual)
    step = max(1, n if budget is None else min(n, int(budget // max(bytes_per_sample, 1))))
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def cancellation_floor(dtype: torch.dtype) -> float:
    """Below which fraction of the sum of its terms' magnitudes a sum with signs has lost its digits.

    A Gram sum is off by about ``4 eps`` of the sum of its diagonal. Asking for 1e-5 (float32) or 1e-9 (float64), a
    tenth of what the library promises, gives the fractions 0.05 and 1e-6.
    """
    wanted = 1e-5 if dtype == torch.float32 else 1e-9
    return 4 * torch.finfo(dtype).eps / wanted


def sign_vectors(shape: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """A fixed direction ``left right^T`` of random signs in a parameter's space, for ``PerSampleGradient.along``."""
    return _sign_vectors(shape[0] if shape else 1, math.prod(shape[1:]), like.dtype, like.device)


@lru_cache(32)
def _sign_vectors(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    left, right = (2.0 * torch.randint(2, (side,), generator=generator) - 1 for side in (rows, columns))
    return left.to(device, dtype), right.to(device, dtype)


LONG = 4096


def squared_norm_of_rows(value: Tensor) -> Tensor:
    """``sum of x ** 2`` over the last axis."""
    # A norm reads large rows once and writes nothing; its own second derivative does not exist at zero.
    if value.numel() <= 2**16 or torch.is_grad_enabled():
        return torch.linalg.vecdot(value, value)
    if value.shape[-1] <= LONG:
        return torch.linalg.vector_norm(value, dim=-1).square()
    # It also adds one square after the other, so that a row of millions loses digits in float32, unlike one of thousands.
    whole = value.shape[-1] // LONG * LONG
    squares = torch.linalg.vector_norm(value[..., :whole].unflatten(-1, (-1, LONG)), dim=-1).square().sum(-1)
    return squares + torch.linalg.vector_norm(value[..., whole:], dim=-1).square()


class PerSampleGradient(ABC):
    """The gradients of one parameter for each of N samples.

    Attributes:
        n: the number of samples N.
        shape: the parameter's shape.
        algorithm: how :meth:`squared_norm` goes about it, for the report.
        sparse: whether the dense gradient of even one sample is far larger than the factors.
    """

    n: int
    shape: tuple[int, ...]
    algorithm: str = "dense"
    sparse: bool = False

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """A tensor with the dtype and on the device of every answer."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of every answer."""
        return self.like.dtype

    @abstractmethod
    def dense(self) -> Tensor:
        """The gradients themselves, ``[n, *shape]``."""

    @abstractmethod
    def select(self, samples: Index) -> PerSampleGradient:
        """The same for some of the samples, by slice or by index tensor."""

    @abstractmethod
    def grouped_by_sample(self, groups: Grouping) -> PerSampleGradient:
        """The gradients of fewer samples, when what counts as a sample here is only a part of one.

        That is so where windows, heads or tokens are folded into the batch axis.
        """

    def squared_norm(self) -> Tensor:
        """``sum of G_n ** 2`` over the parameter's entries, ``[n]``."""
        return self.dense_squared_norm()

    def dense_squared_norm(self) -> Tensor:
        """:meth:`squared_norm` from the gradients themselves, without a sum in which digits could cancel."""
        return torch.cat([squared_norm_of_rows(part.dense().flatten(1)) for part in self.parts()])

    def sum_of_squares(self) -> Tensor:
        """``sum_n G_n ** 2`` entry by entry, ``[*shape]``: the diagonal of ``sum_n vec(G_n) vec(G_n)^T``."""
        return _total(part.dense().square().sum(0) for part in self.parts())

    def total(self) -> Tensor:
        """``sum_n G_n``, ``[*shape]``: what autograd's gradient of the batch is."""
        return _total(part.dense().sum(0) for part in self.parts())

    def batch_gradient_norm(self) -> Tensor | None:
        """``||sum_n G_n||``, if the factors tell it for less than reading a tensor of the parameter's size takes."""
        return None

    def along(self, left: Tensor, right: Tensor) -> Tensor:
        """``<left right^T, sum_n G_n>`` with the shape read as ``(left, right)``: one number to compare with autograd's."""
        return left @ self.total().reshape(len(left), -1) @ right

    def inner(self, other: PerSampleGradient) -> Tensor:
        """``<G_n, H_n>`` with the other form's gradients of the same samples, ``[n]``."""
        for a, b in ((self, other), (other, self)):
            if (value := a.factored_inner(b)) is not None:
                return value
        pairs = ((self.select(rows), other.select(rows)) for rows in self._chunks())
        return torch.cat([(a.dense().flatten(1) * b.dense().flatten(1)).sum(1) for a, b in pairs])

    def __add__(self, other: PerSampleGradient) -> PerSampleGradient:
        """The sum of both, for another use of the same parameter by the same samples."""
        if (self.n, self.shape) != (other.n, other.shape):
            raise ValueError(f"cannot add {self.n} gradients of {self.shape} and {other.n} of {other.shape}")
        terms = [*(self.terms if isinstance(self, Sum) else [self])]
        for new in other.terms if isinstance(other, Sum) else [other]:
            for position, term in enumerate(terms):
                if (both := term.concatenated(new)) is not None:
                    terms[position] = both
                    break
            else:
                terms.append(new)
        return terms[0] if len(terms) == 1 else Sum(terms)

    def concatenated(self, other: PerSampleGradient) -> PerSampleGradient | None:
        """Both uses as one form of the same kind, or None if the kinds don't allow it."""
        return None

    def factored_inner(self, other: PerSampleGradient) -> Tensor | None:
        """:meth:`inner` from the factors alone, or None where this form knows no such way with the other."""
        return None

    def parts(self) -> Iterator[PerSampleGradient]:
        """The samples in groups whose dense gradients fit into :data:`CHUNK_BYTES`."""
        return (self.select(rows) for rows in self._chunks())

    def _chunks(self) -> Iterator[slice]:
        return chunks(self.n, math.prod(self.shape) * self.dtype.itemsize)


class Dense(PerSampleGradient):
    """The gradients as a tensor ``[n, *shape]``: biases, scales, whatever is small."""

    def __init__(self, value: Tensor):
        self.value = value = at_least_float32(value)
        self.n, self.shape = value.shape[0], tuple(value.shape[1:])

    @property
    def like(self) -> Tensor:
        return self.value

    def dense(self) -> Tensor:
        return self.value

    def select(self, samples: Index) -> Dense:
        return Dense(self.value[samples])

    def squared_norm(self) -> Tensor:
        return squared_norm_of_rows(self.value.reshape(self.n, -1))

    def grouped_by_sample(self, groups: Grouping) -> Dense:
        return Dense(groups.sums(self.value))

    def concatenated(self, other: PerSampleGradient) -> PerSampleGradient | None:
        return Dense(self.value + other.value) if isinstance(other, Dense) else None


class Sum(PerSampleGradient):
    """A sum of forms of different kinds: an embedding tied to the output layer, say.

    ``||A + B||^2 = ||A||^2 + ||B||^2 + 2 <A, B>`` where a term is sparse; where the cross terms cancel nearly
    all of the squares, and where no term is sparse, the terms are added up densely for a few samples at a time.
    """

    def __init__(self, terms: list[PerSampleGradient]):
        self.terms = terms
        self.n, self.shape = terms[0].n, terms[0].shape
        self.algorithm = " + ".join(dict.fromkeys(term.algorithm for term in terms))

    @property
    def like(self) -> Tensor:
        return max((term.like for term in self.terms), key=lambda like: like.dtype.itemsize)

    def dense(self) -> Tensor:
        return torch.stack([term.dense() for term in self.terms]).sum(0)

    def select(self, samples: Index) -> Sum:
        return Sum([term.select(samples) for term in self.terms])

    def grouped_by_sample(self, groups: Grouping) -> Sum:
        return Sum([term.grouped_by_sample(groups) for term in self.terms])

    def squared_norm(self) -> Tensor:
        if not any(term.sparse for term in self.terms):
            return super().squared_norm()
        squares = torch.stack([term.squared_norm() for term in self.terms]).sum(0)
        cross = [a.inner(b) for i, a in enumerate(self.terms) for b in self.terms[:i]]
        return recompute_cancelled(squares + 2 * torch.stack(cross).sum(0), squares, self)

    def total(self) -> Tensor:
        return _total(term.total() for term in self.terms)

    def along(self, left: Tensor, right: Tensor) -> Tensor:
        return _total(term.along(left, right) for term in self.terms)


def recompute_cancelled(norms: Tensor, magnitude: Tensor, form: PerSampleGradient) -> Tensor:
    """``norms``, with those that cancelled below :func:`cancellation_floor` of ``magnitude`` computed densely."""
    lost = norms.detach() < cancellation_floor(norms.dtype) * magnitude.detach()
    if not bool(lost.any()):
        return norms
    samples = lost.nonzero().squeeze(1)
    return norms.index_copy(0, samples, form.select(samples).dense_squared_norm())


def _total(values: Iterator[Tensor]) -> Tensor:
    total = next(values)
    for value in values:
        total = total + value
    return total
