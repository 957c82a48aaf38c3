"""Whether a loss selects among samples: its derivatives are constant until the order of the samples changes.

Hard examples (the largest losses of a batch), trimmed means and pairwise hinges have no second derivative between samples. But
the graph of the loss shows them: it has a node that selects among entries of several samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from torch_secorder.autograd.graph_pass import GraphPass
from torch_secorder.autograd.nodes import Edge, output_dtype, value_shape
from torch_secorder.autograd.opaque import Gradients
from torch_secorder.autograd.product_bits import bits_of
from torch_secorder.autograd.saved import knows, saved
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.errors import CurvatureError, VerificationError
from torch_secorder.verification.tolerances import MIXED_ENTRIES

# Nodes that select among all entries of their input, and nodes that select along some axes, with this library's name for those.
AMONG_ALL = {"MaxBackward1", "MinBackward1", "MedianBackward0"}
ALONG = dict.fromkeys(("Topk", "Sort", "Kthvalue", "Max", "Min"), "axis") | {"Amax": "axes", "Amin": "axes"}
ALONG_AXES = {f"{name}Backward0": axes for name, axes in ALONG.items()} | {"MedianBackward1": "axis"}
# Nodes whose derivative jumps with the value of an entry, and nodes where it depends on which of two entries is larger.
_JUMPS = "Relu LeakyRelu Threshold Clamp ClampMin ClampMax Hardtanh Abs SmoothL1Loss HuberLoss"
JUMPS = {f"{name}Backward{version}" for name in _JUMPS.split() for version in (0, 1)}
COMPARES = {"MaximumBackward0", "MinimumBackward0"}
SELECTS = {*AMONG_ALL, *ALONG_AXES, *JUMPS, *COMPARES}

Axes = tuple[int, ...]


def selects_among_samples(loss: Tensor, outputs: Sequence[Tensor], n: int, placements: Sequence[Placement]) -> bool:
    """Whether some node between outputs and their loss selects among entries that belong to different samples.

    If an entry belongs to one sample, its derivative in the direction of all outputs keeps its size when some samples' directions
    change their sign. Its own signs tell which sample it belongs to.

    Args:
        loss: the loss.
        outputs: the tensors that it is computed from.
        n: the number of samples.
        placements: for each output where it has its samples.
    """
    if any(x.is_nested or x.is_complex() for x in outputs):
        return False
    ends = {get_gradient_edge(x).node for x in outputs}
    try:
        return any(_selects(loss, outputs, n, placements, node) for node in _selecting(loss.grad_fn, ends))
    except (
        RuntimeError,
        CurvatureError,
    ):  # some operation has no second derivative, or cannot be differentiated by a graph pass
        return False


def coupling_loss() -> VerificationError:
    """The refusal of a loss that couples samples."""
    return VerificationError(
        "the loss's gradient in one sample's outputs changes with the other samples' outputs: a loss that compares samples with "
        "each other (contrastive, load balancing, batch statistics) or selects among them (hard examples, trimmed means, "
        "pairwise hinges) has no per-sample gradients; to hold a choice or weights of samples fixed, compute them before and "
        "pass them with the targets (in a monitor's block, compute them from detached outputs)"
    )


def _selecting(start: Node | None, ends: set[Node]) -> Iterator[Node]:
    """The nodes between a loss and its model's outputs that select among several entries."""
    stack, seen = [start], {start}
    while stack:
        node = stack.pop()
        if node is None or node in ends:
            continue
        if node.name() in SELECTS:
            yield node
        for child, _ in node.next_functions:
            if child not in seen:
                seen.add(child)
                stack.append(child)


def _selects(loss: Tensor, outputs: Sequence[Tensor], n: int, placements: Sequence[Placement], node: Node) -> bool:
    inputs = [(child, nr) for child, nr in node.next_functions if child is not None]
    tangents = [_tangents(loss, outputs, n, placements, GradientEdge(*edge)) for edge in inputs]
    if not inputs or any(found is None for found in tangents):
        return False
    entries = torch.stack(torch.broadcast_tensors(*[found for found in tangents if found is not None]), -1)
    plain, signed = entries[0], entries[1:]
    tolerance = MIXED_ENTRIES[bits_of([loss, *outputs], outputs)]
    floor = tolerance * entries.abs().amax()
    if bool(((signed.abs() - plain.abs()).abs() > floor).any()):
        return True
    signs = torch.where(plain.abs() > floor, signed.sign() * plain.sign(), 0)
    among = [1 + axis for axis in (*_selected_axes(node, inputs[0]), plain.dim() - 1)]
    return bool(((signs.amax(among) > 0) & (signs.amin(among) < 0)).any())


def _selected_axes(node: Any, edge: Edge) -> Axes:
    """The axes of its input along which a node selects."""
    name, dims = node.name(), len(value_shape(*edge))
    if name in AMONG_ALL:
        return tuple(range(dims))
    if name not in ALONG_AXES or not knows(name, ALONG_AXES[name]):
        return ()
    found = saved(node, ALONG_AXES[name])
    listed = tuple(found) if isinstance(found, (tuple, list)) else (found,)
    return tuple(axis % dims for axis in listed if dims) or tuple(range(dims))


def _tangents(
    loss: Tensor, outputs: Sequence[Tensor], n: int, placements: Sequence[Placement], edge: GradientEdge
) -> Tensor | None:
    """Derivatives of a value in the direction of random outputs, ``[1 + sets of signs, *shape]``; None if it has none.

    In each set, a binary digit of the samples' numbers says which samples' directions have the opposite sign.
    """
    shape, dtype = value_shape(edge.node, edge.output_nr), output_dtype(edge.node, edge.output_nr)
    cotangent = torch.zeros(shape, device=loss.device, dtype=dtype, requires_grad=True)
    arrived: dict[Edge, Tensor | None] = {}

    def arrive(node: Node, grads: Gradients) -> None:
        arrived.update({(node, nr): grad for nr, grad in enumerate(grads)})

    with torch.enable_grad():
        GraphPass([loss], [get_gradient_edge(x).node for x in outputs], create_graph=True, start=edge).run(
            lambda: [cotangent * 1], arrive
        )
        found = [arrived.get((end.node, end.output_nr)) for end in map(get_gradient_edge, outputs)]
        reached = [(g, where) for g, where in zip(found, placements, strict=True) if g is not None and g.requires_grad]
        if not reached:
            return None
        generator = torch.Generator().manual_seed(0)
        products = [
            (g * torch.randn(g.shape, generator=generator, dtype=torch.float32, device="cpu").to(g), where)
            for g, where in reached
        ]
        rows = [sums_of_samples(product, where, n) for product, where in products]
        of_samples = sum(rows[1:], rows[0])
        samples = torch.arange(n, device="cpu")
        kept = [torch.ones_like(samples), *(1 - 2 * (samples >> place & 1) for place in range((n - 1).bit_length()))]
        return torch.stack(
            [torch.autograd.grad(of_samples, cotangent, signs.to(of_samples), retain_graph=True)[0] for signs in kept]
        )


def sums_of_samples(product: Tensor, placement: Placement, n: int) -> Tensor:
    """The sums over each sample's entries, ``[n]``."""
    rows = product.movedim(placement.axis, 0).flatten(1).sum(1) if product.dim() > 1 else product.reshape(-1)
    groups = placement.grouping(n, rows.device)
    return rows if groups is None else groups.sums(rows)
