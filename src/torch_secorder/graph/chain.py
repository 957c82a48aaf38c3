"""The batch-free chain: from the gradient of a value back to what the value was computed from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from torch import Tensor
from torch.autograd.graph import Node

from torch_secorder.autograd.nodes import Edge, output_dtype, value_shape
from torch_secorder.autograd.route import Route
from torch_secorder.autograd.saved import settings
from torch_secorder.errors import UnsupportedError
from torch_secorder.graph.chain_flow import ChainFlow
from torch_secorder.graph.refusals import OPAQUE_FUNCTION
from torch_secorder.per_sample import Dense, Outer, PerSampleGradient, PulledBack
from torch_secorder.per_sample.budget import chunks
from torch_secorder.per_sample.profiles import profile_of

# Nodes that only move entries, or leave some out, so that the gradient of what they take has the norm of what arrives.
_NAMES = (
    "T Transpose Permute View UnsafeView ReshapeAlias Unsqueeze Squeeze Alias Clone ToCopy "
    "Select Slice Split SplitWithSizes UnsafeSplit Chunk Unbind Narrow"
)
PERMUTES_ENTRIES = {f"{name}Backward0" for name in _NAMES.split()}
TRANSPOSES = {"TBackward0", "TransposeBackward0", "PermuteBackward0"}
# Nodes whose first input gets the gradient that arrives, as in ``1 + w``.
ADDS = {"AddBackward0", "SubBackward0"}


@dataclass(frozen=True)
class BatchFreeVjp:
    """The vector-Jacobian product of a batch-free chain, which leads from a parameter to a value.

    In place of the parameter there may be the output of a module that was called without a batch axis.

    Attributes:
        value: the node that made the value, and which of its outputs it is.
        start: the node that accumulates the parameter's gradient, or made the call's output.
        shape: the parameter's or the output's.
        permutation: if the chain only moves entries, something that is equal for chains that move them alike; else None. The
            empty tuple is a chain that leaves them where they are: one without nodes, or ``1 + w``.
        closed: nodes behind which gradients are accounted for elsewhere: where data comes in, and other starts of the value.
    """

    value: Edge
    start: Node
    shape: tuple[int, ...]
    permutation: tuple[object, ...] | None
    closed: frozenset[Node] = frozenset()

    @cached_property
    def flow(self) -> ChainFlow:
        """The flow down the chain, which all nodes that take the value have in common."""
        return _flow([self], self.route)

    @cached_property
    def route(self) -> Route:
        """The nodes of the chain."""
        return Route([self.value[0]], [self.start], closed=self.closed)

    def __call__(self, form: PerSampleGradient) -> PerSampleGradient:
        """The gradient of the parameter for each sample, given that of the value."""
        if self.permutation == ():
            return form
        if isinstance(form, Outer) and form.a.shape[1] == 1 and self._transposes(form):
            return Outer(form.g, form.a, self.shape)
        return self.pulled_back(form, partial(_vjp, self))

    def pulled_back(self, form: PerSampleGradient, vjp: Callable[[Tensor], Tensor]) -> PulledBack:
        """The gradient that this product makes of the value's."""
        return PulledBack(form, vjp, self.shape, self.permutation)

    def _transposes(self, form: Outer) -> bool:
        single = self.value[0].name() in TRANSPOSES and self.permutation is not None and len(self.permutation) == 1
        return single and len(self.shape) == 2 and form.shape == self.shape[::-1]


def batch_free_vjp(
    value: Edge, start: Node, shape: tuple[int, ...], closed: frozenset[Node] = frozenset()
) -> BatchFreeVjp:
    """The product for the chain from ``start`` to ``value``, which is looked through once."""
    chain = _line(value, start)
    permutation = None
    moves = None if chain is None else [edge for edge in chain if not _adds_a_constant(*edge)]
    if moves is not None and all(node.name() in PERMUTES_ENTRIES for node, _ in moves):
        settled = [(node.name(), nr, settings(node)) for node, nr in moves]
        permutation = None if any(found is None for _, _, found in settled) else tuple(settled)
    return BatchFreeVjp(value, start, shape, permutation, closed)


def _adds_a_constant(node: Node, nr: int) -> bool:
    """Whether a node with one input hands its gradient on as it is, since it adds a constant that is no larger."""
    if node.name() not in ADDS:
        return False
    child, child_nr = node.next_functions[0]
    return (
        child is not None
        and value_shape(child, child_nr) == value_shape(node, nr)
        and output_dtype(child, child_nr) == output_dtype(node, nr)
    )


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


def common_route(chains: Sequence[BatchFreeVjp]) -> Route:
    """The nodes between one value and all starts of these chains, which have the same closed nodes."""
    if len(chains) == 1:
        return chains[0].route
    return Route([chains[0].value[0]], [chain.start for chain in chains], closed=chains[0].closed)


def pulled_back(form: PerSampleGradient, chains: Sequence[BatchFreeVjp]) -> list[PerSampleGradient]:
    """The gradients of all starts of one value for each sample, given that of the value.

    Gradients flow once for all starts, as far as theirs fit into the memory of temporaries together.
    """
    together = [chain for chain in chains if chain.permutation is None and chain.closed == chains[0].closed]
    size = math.prod(form.shape) + sum(math.prod(chain.shape) for chain in together)
    if len(together) < 2 or not _fits_at_once(form, size):
        return [chain(form) for chain in chains]
    flow, dense = _CommonFlow(together), Dense(form.dense())
    return [chain.pulled_back(dense, partial(flow, chain)) if chain in together else chain(form) for chain in chains]


def _fits_at_once(form: PerSampleGradient, size: int) -> bool:
    """Whether ``size`` elements for each sample fit into the budget of temporaries."""
    pieces = chunks(form.n, size * form.dtype.itemsize, profile_of(form.like.device).chunk_bytes)
    return next(pieces, slice(0, 0)).stop == form.n


class _CommonFlow:
    """The vector-Jacobian products of chains from one value, which keeps the answers to the last gradients it was asked for."""

    def __init__(self, chains: Sequence[BatchFreeVjp]) -> None:
        self._chains, self._flow = chains, _flow(chains, common_route(chains))
        self._grads: Tensor | None = None
        self._found: list[Tensor] = []

    def __call__(self, chain: BatchFreeVjp, grads: Tensor) -> Tensor:
        if grads is not self._grads:
            self._grads, self._found = grads, self._flow(grads)
        return self._found[self._chains.index(chain)]


def _vjp(chain: BatchFreeVjp, grads: Tensor) -> Tensor:
    """``[n, *value shape]`` -> ``[n, *shape]`` through the batch-free chain between the two."""
    return chain.flow(grads)[0]


def _flow(chains: Sequence[BatchFreeVjp], route: Route) -> ChainFlow:
    """The flow down several chains from one value, along their common route."""
    if not route.ends.issuperset(chain.start for chain in chains):
        raise UnsupportedError(
            "what was computed from a parameter alone went through something that can't be looked through: re-entrant activation "
            f"checkpointing, or {OPAQUE_FUNCTION}; compute it outside of that"
        )
    starts, permutes = [(chain.start, chain.shape) for chain in chains], all(map(_permutes, chains))
    return ChainFlow(route, chains[0].value, starts, permutes=permutes)


def _permutes(chain: BatchFreeVjp) -> bool:
    return chain.permutation is not None
