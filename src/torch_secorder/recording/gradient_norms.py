"""The norms of a backward pass's parameter gradients, as they are added to ``.grad``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import Node

from torch_secorder.autograd.contributions import Identity, identity, note_contribution
from torch_secorder.capture.records import SMALL
from torch_secorder.per_sample import at_least_float32, in_rows
from torch_secorder.recording.batch import alike
from torch_secorder.recording.small_calls import MOST_CALLS


@dataclass(eq=False)
class GradientNorms:
    """``||grad_p L_b||`` of every parameter p that one backward pass reaches."""

    _from_factors: dict[int, Tensor] = field(default_factory=dict)  # norms that layers' factors told
    _contributions: dict[int, Identity] = field(default_factory=dict)  # what these layers contribute to the gradients
    _norms: dict[int, Tensor] = field(default_factory=dict)
    _batched: list[tuple[list[int], Tensor]] = field(default_factory=list)  # positions, and a norm for each
    _waiting: dict[int, Tensor] = field(default_factory=dict)  # small gradients whose norms are still to be taken

    def expect(self, position: int, norm: Tensor, node: Node | None, leaf: Tensor) -> None:
        """A layer's factors tell the norm of what it contributes to a parameter's gradient, which holds if nothing else does.

        Args:
            position: the parameter.
            norm: that norm.
            node: the node of the layer's output, whose hook is running.
            leaf: the parameter as the graph has it.
        """
        if note_contribution(node, leaf, partial(self._contributions.__setitem__, position)):
            self._from_factors[position] = norm

    def add(self, position: int, grad: Tensor, as_added: bool = True) -> None:
        """A parameter's gradient; ``as_added`` unless a hook of the user's may still change it."""
        known = self._from_factors.pop(position, None)
        if not as_added:
            self._norms[position] = norm(grad) * math.nan
            return
        if known is not None and grad.dtype == known.dtype and self._contributions.get(position) == identity(grad):
            self._norms[position] = known
            return
        # The norm is taken now, or a reference is kept: that makes autograd accumulate into a copy, so that later changes of
        # .grad in place, or of a communication buffer, do not reach this tensor.
        if grad.numel() > SMALL or grad.dtype not in (torch.float32, torch.float64) or grad.is_sparse:
            self._norms[position] = norm(grad)
            return
        self._waiting[position] = grad
        if len(self._waiting) == MOST_CALLS:
            self._take_waiting()

    def _take_waiting(self) -> None:
        alike: dict[Hashable, tuple[list[int], list[Tensor]]] = {}
        for position, grad in self._waiting.items():
            positions, grads = alike.setdefault((grad.shape, grad.dtype, grad.device), ([], []))
            positions.append(position)
            grads.append(grad)
        for positions, grads in alike.values():
            rows = in_rows(torch.stack(grads))
            self._batched.append((positions, torch.linalg.vector_norm(rows, dim=1)))
        self._waiting.clear()

    def all(self) -> tuple[list[int], Tensor]:
        """The positions that have a gradient, and its norm for each in float64 on one device."""
        if self._waiting:
            self._take_waiting()
        if self._norms:
            self._batched.append((list(self._norms), torch.stack(alike(list(self._norms.values())))))
            self._norms = {}
        if not self._batched:
            return [], torch.zeros(0)
        if len(self._batched) == 1:
            return self._batched[0][0], self._batched[0][1].double()
        positions, norms = zip(*self._batched, strict=True)
        return list(itertools.chain.from_iterable(positions)), torch.cat(alike(list(norms))).double()


def norm(grad: Tensor) -> Tensor:
    """``||grad||``, in at least float32."""
    values = grad.detach().coalesce().values() if grad.is_sparse else grad.detach()
    return torch.linalg.vector_norm(at_least_float32(values))
