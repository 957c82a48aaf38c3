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
from torch_secorder.autograd.precision import HALF
from torch_secorder.capture.records import SMALL
from torch_secorder.per_sample import FULL, at_least_float32
from torch_secorder.recording.batch import alike
from torch_secorder.recording.small_calls import MOST_CALLS


@dataclass(eq=False)
class GradientNorms:
    """``||grad_p L_b||`` of every parameter p that one backward pass reaches.

    Args:
        waits: whether small gradients may be kept, so that their norms are taken together. Autograd copies a gradient that is
            kept, and a mode of the user's that sees every operation would see that copy.
    """

    waits: bool = True
    _from_factors: dict[int, Tensor] = field(default_factory=dict)  # norms that layers' factors gave
    _contributions: dict[int, Identity] = field(default_factory=dict)  # what these layers contribute to the gradients
    _norms: dict[int, Tensor] = field(default_factory=dict)
    _batched: list[tuple[list[int], Tensor]] = field(default_factory=list)  # positions, and a norm for each
    _waiting: dict[int, Tensor] = field(default_factory=dict)  # small gradients whose norms are still to be taken
    _seen: set[int] = field(default_factory=set)  # positions of which a gradient arrived
    _torn: set[int] = field(default_factory=set)  # and those of which several did

    def expect(self, position: int, norm: Tensor, node: Node | None, leaf: Tensor) -> None:
        """Note the norm of a layer's contribution to a parameter's gradient, which is all of it if nothing else contributes.

        Args:
            position: the parameter.
            norm: the norm of the contribution.
            node: the node of the layer's output, whose hook is running.
            leaf: the parameter as the graph has it.
        """
        if note_contribution(node, leaf, partial(self._contributions.__setitem__, position)):
            self._from_factors[position] = norm

    def keep(self, position: int, grad: Tensor) -> bool:
        """Keep a small gradient, to take its norm later; returns whether it was kept. This computes nothing, so it cannot fail.

        The reference that is kept makes autograd accumulate into a copy, so that later changes of .grad in place, or of a
        communication buffer, do not reach this tensor.
        """
        if (
            not self.waits
            or position in self._seen
            or position in self._from_factors
            or grad.numel() > SMALL
            or grad.dtype not in FULL
            or grad.is_sparse
            or not grad.is_cpu  # There, the copy that autograd makes takes as long as the norm.
        ):
            return False
        if len(self._waiting) == MOST_CALLS:
            return False
        self._waiting[position] = grad
        self._seen.add(position)
        return True

    def add(self, position: int, grad: Tensor, as_added: bool = True) -> None:
        """Add a parameter's gradient; ``as_added`` is False if a hook of the user's may still change it.

        A parameter that is used inside of a re-entrant checkpoint and outside of it, or in two of them, gets its gradient in
        parts, in passes of their own. Nothing has their sum, so that its norm is not a number.
        """
        if position in self._seen:
            self._torn.add(position)
            return
        known = self._from_factors.pop(position, None)
        if not as_added:
            self._norms[position] = norm(grad) * math.nan
            self._seen.add(position)
            return
        if known is not None and grad.dtype == known.dtype and self._contributions.get(position) == identity(grad):
            self._norms[position] = known
            self._seen.add(position)
            return
        if len(self._waiting) == MOST_CALLS:
            self._take_waiting()
        if not self.keep(position, grad):
            self._norms[position] = norm(grad)
            self._seen.add(position)

    def _take_waiting(self) -> None:
        alike: dict[Hashable, tuple[list[int], list[Tensor]]] = {}
        for position, grad in self._waiting.items():
            positions, grads = alike.setdefault((grad.shape, grad.dtype, grad.device), ([], []))
            positions.append(position)
            grads.append(grad)
        norms: list[Tensor] = []
        for _, grads in alike.values():
            if len(grads) == 1:
                norms.append(torch.linalg.vector_norm(grads[0]).view(1))
                continue
            rows = torch.stack(grads)[:, None].flatten(1)  # A gradient may have one number, or none.
            norms.append(torch.linalg.vector_norm(rows, dim=1))
        positions = [position for several, _ in alike.values() for position in several]
        self._batched.append((positions, torch.cat(norms)))  # All are on the host; the widest dtype wins.
        self._waiting.clear()

    def all(self) -> tuple[list[int], Tensor]:
        """The positions that have a gradient, and its norm for each, on one device."""
        if self._waiting:
            self._take_waiting()
        if self._norms:
            self._batched.append((list(self._norms), torch.stack(alike(list(self._norms.values())))))
            self._norms = {}
        if not self._batched:
            return [], torch.zeros(0, dtype=torch.float64, device="cpu")
        several, norms = zip(*self._batched, strict=True)
        positions = list(itertools.chain.from_iterable(several))
        found = norms[0] if len(norms) == 1 else torch.cat(alike(list(norms)))
        if self._torn:
            whole = [1.0 if position not in self._torn else math.nan for position in positions]
            found = found * found.new_tensor(whole)
        return positions, found


# A gradient in half precision is widened in parts of this many entries, which stay in the caches of a CPU.
WIDENED_AT_ONCE = 2**20


def norm(grad: Tensor) -> Tensor:
    """``||grad||``, in at least float32."""
    values = grad.detach().coalesce().values() if grad.is_sparse else grad.detach()
    if values.dtype in HALF and values.device.type == "cpu" and values.numel() > WIDENED_AT_ONCE:
        parts = values.flatten().split(WIDENED_AT_ONCE)
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part.float()) for part in parts]))
    return torch.linalg.vector_norm(at_least_float32(values))
