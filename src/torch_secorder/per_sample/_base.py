"""The contract of the algebra, and its two forms without structure: a dense tensor and a sum of unlike terms."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from torch_secorder.batch_axis.placement import Grouping
from torch_secorder.model.channels import ChannelSums
from torch_secorder.per_sample.arithmetic import (
    FULL,
    at_least_float32,
    cancellation_floor,
    in_rows,
    joined,
    one_direction,
    real_entries,
    squared_norm_of_rows,
    zeroed,
)
from torch_secorder.per_sample.budget import chunks
from torch_secorder.per_sample.profiles import profile_of

Index = slice | Tensor
# Squared norms in which digits may have cancelled, and the sizes of the summands; the sizes are None if nothing can cancel.
Unguarded = tuple[Tensor, Tensor | None]


def _channel_squares(value: Tensor, channels: ChannelSums) -> Tensor:
    """The sums of squares over each channel, ``[n, channels]``, of real gradients ``[n, *shape]``."""
    if channels.axis or value.dim() < 3:
        return channels.of_samples(value.square())
    return squared_norm_of_rows(value.flatten(2))


class PerSampleGradient(ABC):
    """The gradients of one parameter for each of N samples.

    The gradients of a complex parameter are complex, as autograd returns them. Their absolute values are squared, so that a norm
    counts the real and the imaginary parts.

    A new form defines ``n`` and ``shape``, and at least :attr:`like`, :meth:`dense`, :meth:`select` and
    :meth:`grouped_by_sample`. All other methods follow from these, for a few samples at a time. Overriding one changes its
    cost, never its value.

    Attributes:
        n: the number of samples N.
        shape: the parameter's shape.
        algorithm: how :meth:`squared_norm` is computed, for the report.
        sparse: whether even one sample's dense gradient is far larger than its factors.
    """

    n: int
    shape: tuple[int, ...]
    algorithm: str = "dense"
    sparse: bool = False

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """A tensor with the dtype and the device of every result."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of every result."""
        return self.like.dtype

    @abstractmethod
    def dense(self) -> Tensor:
        """The gradients themselves, ``[n, *shape]``."""

    @abstractmethod
    def select(self, samples: Index) -> PerSampleGradient:
        """The gradients of some of the samples, given by a slice or an index tensor."""

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

    def squared_norm(self) -> Tensor:
        """``sum of G_n ** 2`` over the parameter's entries, ``[n]``."""
        return self.dense_squared_norm()

    @property
    def may_cancel(self) -> bool:
        """Whether the squared norms are sums with signs, which can lose all digits."""
        return False

    def unguarded_squared_norm(self) -> Unguarded:
        """The squared norms before any check for cancelled digits, and the sizes of the summands."""
        return self.squared_norm(), None

    def dense_squared_norm(self) -> Tensor:
        """:meth:`squared_norm` from the gradients themselves: no sum with signs, and no digits that cancel."""
        return joined(squared_norm_of_rows(in_rows(part.dense())) for part in self.parts())

    def norms(self) -> Tensor | None:
        """``|G_n|``, ``[n]``, to be squared later for all parameters at once; None if this form computes the squares directly."""
        return None

    def dense_norms(self) -> Tensor:
        """:meth:`norms` from the gradients themselves."""
        return joined(torch.linalg.vector_norm(in_rows(part.dense()), dim=1) for part in self.parts())

    def sum_of_squares(self) -> Tensor:
        """``sum_n |G_n| ** 2`` entry by entry, ``[*shape]``: the diagonal of ``sum_n vec(G_n) vec(G_n)^T``.

        For complex entries it is the sum for the real and for the imaginary parts.
        """
        squares = (real_entries(part.dense()).square().sum(0) for part in self.parts())
        return _total(value.sum(-1) if value.dim() > len(self.shape) else value for value in squares)

    def channel_squares(self, channels: ChannelSums) -> Tensor:
        """The sums of :meth:`sum_of_squares` over each channel, ``[channels]``."""
        return channels.of(self.sum_of_squares())

    def sample_channel_squares(self, channels: ChannelSums) -> Tensor:
        """The sums of ``|G_n| ** 2`` over each channel, ``[n, channels]``, here from the gradients themselves.

        Their sums over the channels are the squared norms, and their sums over the samples are :meth:`channel_squares`. Both
        sums have all their digits; in a single entry digits may have cancelled.
        """
        return joined(_channel_squares(part.dense(), channels) for part in self.parts())

    def shares_norms_with(self, channels: ChannelSums) -> bool:
        """Whether :meth:`sample_channel_squares` costs about as much as the squared norms and can replace them."""
        return False

    def total(self) -> Tensor:
        """``sum_n G_n``, ``[*shape]``: the gradient that autograd computes for the batch."""
        return _total(part.dense().sum(0) for part in self.parts())

    def batch_gradient_norm(self) -> Tensor | None:
        """``||sum_n G_n||``, if the factors give it faster than a tensor of the parameter's size can be read; else None."""
        return None

    def along(self, left: Tensor, right: Tensor) -> Tensor:
        """``<left right^T, sum_n G_n>``, the total along one direction: a single number to compare with autograd's gradient.

        The shape is read as ``(left, right)``. For complex gradients it is the sum for the real and for the imaginary parts.
        """
        return left @ one_direction(self.total()).reshape(len(left), len(right)) @ right

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

    def parts(self) -> Iterator[PerSampleGradient]:
        """The samples in groups whose dense gradients fit into the memory budget of temporaries."""
        return (self.select(rows) for rows in self._chunks())

    def _chunks(self) -> Iterator[slice]:
        return chunks(self.n, math.prod(self.shape) * self.dtype.itemsize, profile_of(self.like.device).chunk_bytes)


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
        squares = _total(norms for norms, _ in found)
        cross = _total(a.inner(b) for i, a in enumerate(self.terms) for b in self.terms[:i])
        # If digits may have cancelled in a term, its error goes by its own sizes.
        sizes = _total(norms if size is None else size.maximum(norms) for norms, size in found)
        return squares + 2 * cross, sizes

    def total(self) -> Tensor:
        return _total(term.total() for term in self.terms)

    def along(self, left: Tensor, right: Tensor) -> Tensor:
        return _total(term.along(left, right) for term in self.terms)


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


def _total(values: Iterator[Tensor]) -> Tensor:
    total = next(values)
    for value in values:
        total = total + value
    return total
