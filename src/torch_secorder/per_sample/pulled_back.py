"""The gradient of a parameter that reaches the data through other tensors first."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from torch_secorder.batch_axis.placement import Grouping
from torch_secorder.per_sample._base import Cancelling, PerSampleGradient
from torch_secorder.per_sample.arithmetic import zero_squared_norms
from torch_secorder.per_sample.dense_answers import Index, Unguarded

# Whether two parts of a parameter have no entry in common. A stack of experts has many pairs of parts, which are the same in
# every step.
_APART: dict[Hashable, bool] = {}
REMEMBERED = 2**12


class PulledBack(Cancelling):
    """``V^T vec(G_n)``, with G_n the gradient of a value computed from the parameter alone and V that computation's Jacobian.

    A value may be a part of the parameter (a chunk of a packed projection, one expert of a stack), its entries in another
    order (a transpose), or a function of it (a weight norm, a pruning mask). For a part or another order, V^T only moves
    entries, so that the norm of G_n is the answer and nothing is formed.

    Args:
        value: gradients of the value.
        vjp: from ``[n, *value shape]`` to ``[n, *shape]``.
        shape: the parameter's shape.
        permutation: if the vjp only moves entries, a key that is equal for vjps that move them alike; None for any other vjp.
    """

    def __init__(
        self,
        value: PerSampleGradient,
        vjp: Callable[[Tensor], Tensor],
        shape: Sequence[int],
        permutation: Hashable | None = None,
    ):
        self.value, self.vjp, self.shape, self.permutation = value, vjp, tuple(shape), permutation
        self.n, self.sparse = value.n, value.sparse or permutation is not None

    @property
    def algorithm(self) -> str:  # type: ignore[override]  # a property where the base has a plain string
        return self.value.algorithm if self.permutation is not None else "dense"

    @property
    def like(self) -> Tensor:
        return self.value.like

    def dense(self) -> Tensor:
        return self.vjp(self.value.dense())

    def select(self, samples: Index) -> PulledBack:
        return PulledBack(self.value.select(samples), self.vjp, self.shape, self.permutation)

    def without(self, lost: Tensor) -> PulledBack:
        return PulledBack(self.value.without(lost), self.vjp, self.shape, self.permutation)

    def grouped_by_sample(self, groups: Grouping) -> PulledBack:
        return PulledBack(self.value.grouped_by_sample(groups), self.vjp, self.shape, self.permutation)

    @property
    def may_cancel(self) -> bool:
        return self.permutation is not None and self.value.may_cancel

    def norms(self) -> Tensor | None:
        return self.dense_norms() if self.permutation is None else self.value.norms()

    def dense_squared_norm(self) -> Tensor:
        # Where entries only move, the nodes that move them are not called, which a pass for other gradients may leave nothing of.
        return super().dense_squared_norm() if self.permutation is None else self.value.dense_squared_norm()

    def unguarded_squared_norm(self) -> Unguarded:
        return (self.dense_squared_norm(), None) if self.permutation is None else self.value.unguarded_squared_norm()

    def total(self) -> Tensor:
        return self.vjp(self.value.total()[None])[0]

    def concatenated(self, other: PerSampleGradient) -> PerSampleGradient | None:
        if not isinstance(other, PulledBack) or self.permutation is None or self.permutation != other.permutation:
            return None
        if self.value.shape != other.value.shape:  # a weight that was broadcast in two ways
            return None
        return PulledBack(self.value + other.value, self.vjp, self.shape, self.permutation)

    def factored_inner(self, other: PerSampleGradient) -> Tensor | None:
        """Zero for two parts that have no entry in common; None for any other pair."""
        if not isinstance(other, PulledBack) or self.permutation is None or other.permutation is None:
            return None
        pair = (self.shape, self.permutation, self.value.shape, other.permutation, other.value.shape)
        if (apart := _APART.get(pair)) is None:
            if len(_APART) > REMEMBERED:
                _APART.clear()
            apart = _APART[pair] = not bool((self._touched() & other._touched()).any())
        return zero_squared_norms(self.n, self.like) if apart else None

    def _touched(self) -> Tensor:
        return self.vjp(torch.ones_like(self.value.select(slice(0, 1)).dense()))[0] != 0
