"""Squared norms of one sample's gradient by plain autograd, with which every check compares.

No rule takes part, and the only hooks are those that read a parameter's whole gradient.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from torch_secorder.autograd.double_precision import together_on_host
from torch_secorder.autograd.engine import current_graph_task, library_pass
from torch_secorder.autograd.graph_pass import GraphPass
from torch_secorder.autograd.nodes import has_others_function
from torch_secorder.autograd.opaque import Gradients
from torch_secorder.autograd.precision import full_precision, is_half
from torch_secorder.autograd.sharded import GatheredWeights
from torch_secorder.autograd.tensor_hooks import untouched
from torch_secorder.batch_axis.placement import FIRST, Placement
from torch_secorder.batch_axis.samples import rows_of
from torch_secorder.errors import UnsupportedError
from torch_secorder.graph.refusals import OPAQUE_FUNCTION
from torch_secorder.model.ranks import full_tensor, is_dtensor
from torch_secorder.per_sample import at_least_float32, in_rows, squared_norm_of_rows
from torch_secorder.recording.gradient_norms import WIDENED_AT_ONCE

SquaredNorm = Tensor | None  # 0-dim; None for a parameter that the backward pass did not reach

# Gradients of so many numbers together are kept until a pass is over. Those of larger models are squared one by one as they
# arrive, which takes a hook on each parameter, but less memory, most of which is still in the caches.
FEW_NUMBERS = 2**20

# The norms of gradients of so many numbers are taken together: for each by itself, a call of torch takes longer than the sum.
SMALL = 2**14


def squared_norms_of_loss(loss: Tensor, leaves: Sequence[Tensor]) -> list[SquaredNorm]:
    """``||gradient of loss||^2`` of each parameter, for the loss of a model that the library called itself.

    The graph is kept, since it may have a part in common with one of the user's: weights that several calls take, computed once.
    """
    if not loss.requires_grad:
        return [None] * len(leaves)
    with untouched(leaves), library_pass([loss]) as starts:
        if has_others_function(loss):  # It may start its own pass.
            return _accumulated_norms(starts, leaves)
        if sum(leaf.numel() for leaf in leaves) <= FEW_NUMBERS:
            gradients = torch.autograd.grad(starts, list(leaves), allow_unused=True, retain_graph=True)
            with torch.no_grad():  # where norms of many numbers are taken by rows, which keeps their digits
                return _squared_norms(gradients)
        with _squared_norms_of_pass(starts, leaves) as found:
            torch.autograd.grad(starts, list(leaves), allow_unused=True, retain_graph=True)
    return found


def _accumulated_norms(starts: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[SquaredNorm]:
    """The same for a graph in which a function may start its own pass, so that gradients are added before they are squared."""
    torch.autograd.backward(starts, inputs=[leaf for leaf in leaves if leaf.requires_grad], retain_graph=True)
    return _squared_norms([leaf.grad for leaf in leaves])


def squared_norms_of_sample(
    outputs: Sequence[Tensor],
    output_gradients: Sequence[Tensor],
    leaves: Sequence[Tensor],
    sample: int,
    *,
    placements: Sequence[Placement] | None = None,
    create_graph: bool = False,
    weights: GatheredWeights | None = None,
) -> list[SquaredNorm]:
    """``||J_n^T s_n||^2`` of each parameter, through the user's own graph, which is not freed.

    Args:
        outputs: what the model returned.
        output_gradients: the gradients s of all samples, in the outputs' shapes.
        leaves: the parameters.
        sample: n, the sample whose gradient is taken.
        placements: where the outputs have their samples, if not all on the first axis.
        create_graph: whether the norms are differentiable.
        weights: gathers weights of which each rank holds a part.
    """
    norms: list[SquaredNorm] = [None] * len(leaves)
    positions = {get_gradient_edge(leaf).node: place for place, leaf in enumerate(leaves) if leaf.requires_grad}

    def arrive(node: Node, grads: Gradients) -> None:
        grad = grads[0]
        norms[positions[node]] = _squared_norms([grad])[0]

    passes = GraphPass(outputs, positions, create_graph=create_graph, weights=weights)
    located = list(zip(output_gradients, placements or [FIRST] * len(outputs), strict=True))
    passes.run(lambda: [of_one_sample(gradient, sample, where) for gradient, where in located], arrive)
    if not passes.hidden.isdisjoint(positions):
        raise UnsupportedError(
            f"re-entrant or selective activation checkpointing (context_fn=), or {OPAQUE_FUNCTION}, hides a part of the graph of "
            "these outputs from a look at one sample: use torch.utils.checkpoint with use_reentrant=False and without "
            "context_fn, or a FisherMonitor around your own backward"
        )
    return norms


def as_row(norms: Sequence[SquaredNorm]) -> Tensor:
    """``[parameters]`` in float64 on the CPU; zero for a parameter that is not reached."""
    values = iter(together_on_host([norm for norm in norms if norm is not None]))
    nothing = torch.zeros((), dtype=torch.float64, device="cpu")
    return torch.stack([nothing if norm is None else next(values) for norm in norms])


def of_one_sample(gradient: Tensor, sample: int, placement: Placement = FIRST) -> Tensor:
    """The gradient with zeros for all other samples."""
    axis, rows = placement.axis, placement.sample_index
    if rows is not None:
        return gradient * rows_of(torch.arange(int(rows.max()) + 1, device="cpu") == sample, gradient, placement)
    alone = torch.zeros_like(gradient)
    alone.select(axis, sample).copy_(gradient.select(axis, sample))
    return alone


@contextmanager
def _squared_norms_of_pass(starts: Sequence[Tensor], leaves: Sequence[Tensor]) -> Iterator[list[SquaredNorm]]:
    """The squared norm of each parameter's gradient, taken when it arrives in the backward pass from these tensors.

    There is never more than one parameter's gradient in memory. Passes of other threads through the same parameters are not
    affected.
    """
    norms: list[SquaredNorm] = [None] * len(leaves)
    tasks: set[int] = set()

    def begin(grads: object) -> None:
        tasks.add(current_graph_task())

    def take(position: int, grad: Tensor) -> Tensor | None:
        if current_graph_task() not in tasks:
            return None
        norms[position] = _squared_norms([grad])[0]
        return _without_memory(grad)

    with ExitStack() as hooks:
        for start in starts:
            assert start.grad_fn is not None
            hooks.callback(start.grad_fn.register_prehook(begin).remove)
        for position, leaf in enumerate(leaves):
            hooks.callback(leaf.register_hook(partial(take, position)).remove)
        yield norms


def _squared_norms(grads: Sequence[Tensor | None]) -> list[SquaredNorm]:
    """``||grad||^2`` of each gradient in at least float32; small ones of one shape are squared together."""
    found: list[SquaredNorm] = [None] * len(grads)
    alike: dict[Hashable, list[int]] = defaultdict(list)
    with full_precision():
        for place, grad in enumerate(grads):
            if type(grad) is Tensor and not grad.is_sparse and grad.numel() <= SMALL:
                alike[grad.shape, grad.dtype, grad.device].append(place)
            elif grad is not None:
                found[place] = _squared_norm(grad)
        for places in alike.values():
            rows = in_rows(torch.stack([grad for place in places if (grad := grads[place]) is not None]))
            for place, norm in zip(places, squared_norm_of_rows(at_least_float32(rows)), strict=True):
                found[place] = norm
    return found


def _squared_norm(grad: Tensor) -> Tensor:
    grad = full_tensor(grad if torch.is_grad_enabled() else grad.detach())
    values = (grad.coalesce().values() if grad.is_sparse else grad).flatten()
    if is_half(values) and values.numel() > WIDENED_AT_ONCE:
        return torch.stack([squared_norm_of_rows(part.float()) for part in values.split(WIDENED_AT_ONCE)]).sum()
    return squared_norm_of_rows(at_least_float32(values))


def _without_memory(grad: Tensor) -> Tensor | None:
    """A tensor that autograd may keep instead of a gradient that was read; None if it has to keep the gradient itself."""
    if grad.is_sparse or is_dtensor(grad) or torch.is_grad_enabled():
        return None
    return grad.new_zeros(()).expand_as(grad)
