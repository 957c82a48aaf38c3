"""The batch-free chain: from the gradient of a value back to what the value was computed from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import Node

from torch_secorder.autograd.nodes import Edge, output_dtype
from torch_secorder.autograd.opaque import Gradients
from torch_secorder.autograd.route import Route
from torch_secorder.autograd.saved import settings
from torch_secorder.errors import UnsupportedError
from torch_secorder.graph.refusals import OPAQUE_FUNCTION
from torch_secorder.per_sample import Outer, PerSampleGradient, PulledBack

# Nodes that only move entries, or leave some out, so that the gradient of what they take has the norm of what arrives.
_NAMES = (
    "T Transpose Permute View UnsafeView ReshapeAlias Unsqueeze Squeeze Alias Clone ToCopy "
    "Select Slice Split SplitWithSizes UnsafeSplit Chunk Unbind Narrow"
)
PERMUTES_ENTRIES = {f"{name}Backward0" for name in _NAMES.split()}
TRANSPOSES = {"TBackward0", "TransposeBackward0", "PermuteBackward0"}


@dataclass(frozen=True)
class BatchFreeVjp:
    """The vector-Jacobian product of a batch-free chain, which leads from a parameter to a value.

    In place of the parameter there may be the output of a module that was called without a batch axis.

    Attributes:
        value: the node that made the value, and which of its outputs it is.
        start: the node that accumulates the parameter's gradient, or made the call's output.
        shape: the parameter's or the output's.
        permutation: if the chain only moves entries, something that is equal for chains that move them alike; else None. The
            empty tuple is the chain without any node.
        closed: nodes that are met on other ways to the start, where data comes in: their gradients are accounted for there.
    """

    value: Edge
    start: Node
    shape: tuple[int, ...]
    permutation: tuple[object, ...] | None
    closed: frozenset[Node] = frozenset()

    def route(self) -> Route:
        """The nodes of the chain."""
        return Route([self.value[0]], [self.start], closed=self.closed)

    def __call__(self, form: PerSampleGradient) -> PerSampleGradient:
        """The gradient of the parameter for each sample, given that of the value."""
        if self.permutation == ():
            return form
        if isinstance(form, Outer) and form.a.shape[1] == 1 and self._transposes(form):
            return Outer(form.g, form.a, self.shape)
        return PulledBack(form, partial(_vjp, self), self.shape, self.permutation)

    def _transposes(self, form: Outer) -> bool:
        single = self.value[0].name() in TRANSPOSES and self.permutation is not None and len(self.permutation) == 1
        return single and len(self.shape) == 2 and form.shape == self.shape[::-1]


def batch_free_vjp(
    value: Edge, start: Node, shape: tuple[int, ...], closed: frozenset[Node] = frozenset()
) -> BatchFreeVjp:
    """The product for the chain from ``start`` to ``value``, which is looked through once."""
    chain = _line(value, start)
    permutation = None
    if chain is not None and all(node.name() in PERMUTES_ENTRIES for node, _ in chain):
        settled = [(node.name(), nr, settings(node)) for node, nr in chain]
        permutation = None if any(found is None for _, _, found in settled) else tuple(settled)
    return BatchFreeVjp(value, start, shape, permutation, closed)


def _line(value: Edge, start: Node) -> list[Edge] | None:
    """The nodes from a value down to its start, if they are a single line; else None."""
    chain, (node, nr) = [], value
    while node != start:
        inputs = [(child, child_nr) for child, child_nr in node.next_functions if child is not None]
        if len(inputs) != 1:
            return None
        chain.append((node, nr))
        node, nr = inputs[0]
    return chain


def _vjp(chain: BatchFreeVjp, grads: Tensor) -> Tensor:
    """``[n, *value shape]`` -> ``[n, *shape]`` through the batch-free chain between the two."""
    route, shape, permutes = chain.route(), chain.shape, chain.permutation is not None
    if chain.start not in route.ends:
        raise UnsupportedError(
            "what was computed from a parameter alone went through something that can't be looked through: re-entrant activation "
            f"checkpointing, or {OPAQUE_FUNCTION}; compute it outside of that"
        )
    # A node that computes has saved tensors of the model's dtype, which may be narrower than that of our gradients.
    dtype = grads.dtype if permutes else output_dtype(*chain.value)
    wanted = _no_narrower(output_dtype(chain.start, 0), grads.dtype)
    found = []
    for grad in grads.to(dtype):
        arrived: list[Tensor] = []
        route.flow({chain.value: grad}, partial(_first_of, arrived), complete=True, keeps_dtype=permutes)
        found.append(arrived[0].reshape(shape).to(wanted) if arrived else grads.new_zeros(shape, dtype=wanted))
    return torch.stack(found) if found else grads.new_zeros(0, *shape, dtype=wanted)


def _no_narrower(start: torch.dtype, gradients: torch.dtype) -> torch.dtype:
    """The dtype of a start's gradients: complex if the start is, and with as many digits as the gradients that come in."""
    real = gradients.to_real()
    return torch.promote_types(start, real) if start.is_complex else real


def _first_of(arrived: list[Tensor], _: Node, grads: Gradients) -> None:
    """Keep the gradient of a start, which has one output."""
    arrived += [grad for grad in grads[:1] if grad is not None]
