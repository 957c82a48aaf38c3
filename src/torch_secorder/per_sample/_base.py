"""What every form can do with others, and the two forms without structure: a dense tensor and a sum of unlike terms."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor

from torch_secorder.batch_axis.placement import Grouping
from torch_secorder.per_sample.arithmetic import (
    FULL,
    at_least_float32,
    cancellation_floor,
    in_rows,
    squared_norm_of_rows,
    total_of,
    zeroed,
)
from torch_secorder.per_sample.dense_answers import DenseAnswers, Index, Unguarded


class PerSampleGradient(DenseAnswers):
    """The gradients of one parameter for each of N samples.

    The gradients of a complex parameter are complex, as autograd returns them. Their absolute values are squared, so that a norm
    counts the real and the imaginary parts.

    A new form defines ``n`` and ``shape``, and at least :attr:`like`, :meth:`dense`, :meth:`select` and
    :meth:`grouped_by_sample`. All other methods follow from these, for a few samples at a time. Overriding one changes its
    cost, never its value.
    """

    def without(self, lost: Tensor) -> PerSampleGradient:
        """The same gradients with zeros for some samples; the host does not have to know which.

        Args:
            lost: ``[n]`` on the device, True for these samples.
        """
        return Dense(zeroed(self.dense(), lost))

    @abstractmethod
    def grouped_by_sample(self, groups: Grouping) -> PerSampleGradient:
        """The gradients of fewer samples, each the sum over a group of this form's samples, which are only parts of samples then.

        Such parts are windows, heads or tokens that were folded into the batch axis.
        """

    def inner(self, other: PerSampleGradient) -> Tensor:
        """``Re <G_n, H_n>`` with the other form's gradients of the same samples, ``[n]``."""
        for a, b in ((self, other), (other, self)):
            if (value := a.factored_inner(b)) is not None:
                return value
        pairs = ((self.select(rows), other.select(rows)) for rows in self._chunks())
        products = (in_rows(a.dense()) * in_rows(b.dense()).conj() for a, b in pairs)
        return torch.cat([(product.real if product.is_complex() else product).sum(1) for product in products])

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
        """The sum of the gradients of two uses as one form of this kind; None if the kinds do not allow that.

        Forms that are sums over positions concatenate the positions of both uses.
        """
        return None

    def factored_inner(self, other: PerSampleGradient) -> Tensor | None:
        """:meth:`inner` from the factors alone; None where this form knows no such way with the other."""
        return None

    def squares_of_summands(self) -> Tensor | None:
        """The sum of the squared norms of the summands that :meth:`factored_inner` adds up, ``[n]``; None if it adds up none."""
        return None


class Cancelling(PerSampleGradient):
    """A form whose squared norms may be sums with signs; :meth:`squared_norm` recomputes those that cancelled."""

    @abstractmethod
    def unguarded_squared_norm(self) -> Unguarded:
        """See the base class. Here the other norms follow from this method."""

    def squared_norm(self) -> Tensor:
        norms, sizes = self.unguarded_squared_norm()
        return norms if sizes is None else recompute_cancelled(norms, sizes, self)


class Dense(PerSampleGradient):
    """The gradients as a tensor ``[n, *shape]``, as for biases, scales and other small parameters."""

    def __init__(self, value: Tensor):
        self.value = value = value if value.dtype in FULL else at_least_float32(value)
        self.n, self.shape = value.shape[0], tuple(value.shape[1:])

    @property
    def like(self) -> Tensor:
        return self.value

    def dense(self) -> Tensor:
        return self.value

    def select(self, samples: Index) -> Dense:
        return Dense(self.value[samples])

    def norms(self) -> Tensor:
        return torch.linalg.vector_norm(in_rows(self.value), dim=1)

    def squared_norm(self) -> Tensor:
        return squared_norm_of_rows(self.value if self.value.dim() == 2 else in_rows(self.value))

    def grouped_by_sample(self, groups: Grouping) -> Dense:
        return Dense(groups.sums(self.value))

    def concatenated(self, other: PerSampleGradient) -> PerSampleGradient | None:
        return Dense(self.value + other.value) if isinstance(other, Dense) else None


class Sum(Cancelling):
    """A sum of forms of different kinds, as of an embedding that is tied to the output layer.

    If a term is sparse, its norms are ``||A + B||^2 = ||A||^2 + ||B||^2 + 2 <A, B>``. If none is, or if the cross terms
    cancel nearly all of the squares, the terms are added up densely for a few samples at a time.
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

    def without(self, lost: Tensor) -> Sum:
        return Sum([term.without(lost) for term in self.terms])

    def grouped_by_sample(self, groups: Grouping) -> Sum:
        return Sum([term.grouped_by_sample(groups) for term in self.terms])

    @property
    def may_cancel(self) -> bool:
        return any(term.sparse for term in self.terms)

    def unguarded_squared_norm(self) -> Unguarded:
        if not self.may_cancel:
            return self.dense_squared_norm(), None
        found = [term.unguarded_squared_norm() for term in self.terms]
        squares = total_of(norms for norms, _ in found)
        cross = total_of(a.inner(b) for i, a in enumerate(self.terms) for b in self.terms[:i])
        # If digits may have cancelled in a term, or in its products with others, its error goes by its own sizes.
        sizes = [
            (norms, size, term.squares_of_summands()) for term, (norms, size) in zip(self.terms, found, strict=True)
        ]
        return squares + 2 * cross, total_of(_largest(several) for several in sizes)

    def total(self) -> Tensor:
        return total_of(term.total() for term in self.terms)

    def along(self, left: Tensor, right: Tensor) -> Tensor:
        return total_of(term.along(left, right) for term in self.terms)


def _largest(several: Iterable[Tensor | None]) -> Tensor:
    """The largest of some numbers for each sample, at least one of which is there."""
    return reduce(torch.maximum, [one for one in several if one is not None])


def has_cancelled(squared_norms: Tensor, sizes: Tensor) -> Tensor:
    """Which squared norms have cancelled below :func:`cancellation_floor` times the sizes of the summands."""
    return squared_norms.detach() < cancellation_floor(squared_norms) * sizes.detach()


def recompute_cancelled(squared_norms: Tensor, sizes: Tensor, form: PerSampleGradient) -> Tensor:
    """The squared norms; those that have cancelled are recomputed densely."""
    lost = has_cancelled(squared_norms, sizes)
    if not bool(lost.any()):
        return squared_norms
    samples = lost.nonzero().squeeze(1)
    return squared_norms.index_copy(0, samples, form.select(samples).dense_squared_norm())
