"""Whether a loss is separable by samples, as far as the existing graph of the loss shows it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from torch_secorder.autograd.graph_pass import GraphPass
from torch_secorder.autograd.nodes import Edge
from torch_secorder.autograd.opaque import Gradients
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.batch_axis.samples import rows_of
from torch_secorder.errors import CurvatureError
from torch_secorder.likelihoods import random_signs
from torch_secorder.verification.selections import coupling_loss, selects_among_samples, sums_of_samples
from torch_secorder.verification.tolerances import SEPARABLE_LOSS


def require_separable_graph(loss: Tensor, outputs: Sequence[Tensor], placements: Sequence[Placement], n: int) -> None:
    """Raise if the loss selects among samples, or has second derivatives between the outputs of different samples.

    An operation without second derivatives shows nothing, and neither does a factor that was detached. The samples are split into
    halves by each binary digit of their numbers, so that any two samples are in different halves at least once.

    Args:
        loss: the loss.
        outputs: the tensors that it is computed from, and maybe other outputs of the model.
        placements: for each output, where it has its samples.
        n: the number of samples.

    Raises:
        VerificationError: if it does.
    """
    if selects_among_samples(loss, outputs, n, placements):
        raise coupling_loss()
    numbers = torch.arange(n, device="cpu")
    scales = _scales(loss, outputs, placements, n)
    for digit in range((n - 1).bit_length()):
        _require_separable_halves(loss, outputs, placements, (numbers >> digit) % 2 == 1, scales)


def output_gradients(loss: Tensor, outputs: Sequence[Tensor], *, create_graph: bool = False) -> list[Tensor | None]:
    """The gradient of the loss with respect to each output; None for outputs that it does not depend on.

    If an output was computed from another one, its gradient does not flow on into the other one's.
    """
    edges = [get_gradient_edge(x) for x in outputs]
    own = {(edge.node, edge.output_nr) for edge in edges}
    arrived: dict[Edge, Tensor | None] = {}

    def arrive(node: Node, grads: Gradients) -> None:
        arrived.update({(node, nr): grad for nr, grad in enumerate(grads)})
        assert isinstance(grads, list)
        grads[:] = [None if (node, nr) in own else grad for nr, grad in enumerate(grads)]

    GraphPass([loss], {edge.node for edge in edges}, create_graph=create_graph).run(
        lambda: [torch.ones_like(loss)], arrive
    )
    return [arrived.get((edge.node, edge.output_nr)) for edge in edges]


def _require_separable_halves(
    loss: Tensor, outputs: Sequence[Tensor], placements: Sequence[Placement], half: Tensor, scales: Sequence[Tensor]
) -> None:
    """Raise if the loss has second derivatives between the outputs of two halves of the samples."""
    masks = [rows_of(half, x, where) for x, where in zip(outputs, placements, strict=True)]
    curved = _products(loss, outputs, [s * m for s, m in zip(scales, masks, strict=True)])
    pairs = zip(curved, scales, masks, strict=True)
    found = [(torch.where(c.isfinite(), c * s, 0.0), m) for c, s, m in pairs if c is not None]
    own = max((float((c * m).norm()) for c, m in found), default=0.0)
    across = max((float((c * ~m).norm()) for c, m in found), default=0.0)
    if across > SEPARABLE_LOSS * own:
        raise coupling_loss()


def _scales(loss: Tensor, outputs: Sequence[Tensor], placements: Sequence[Placement], n: int) -> list[Tensor]:
    """For each output a number for each sample, as a tensor that broadcasts along it.

    In outputs that are divided by these numbers, all samples have second derivatives of about the same size. Otherwise one sample
    with very large ones would hide all others, as a vector of zeros that a loss normalizes does.
    """
    found = []
    curved = _products(loss, outputs, [torch.ones_like(x.detach()) for x in outputs])
    for x, where, own in zip(outputs, placements, curved, strict=True):
        sizes = torch.zeros(n, dtype=torch.float64, device="cpu")
        if own is not None:
            sizes = sums_of_samples(own.detach().abs().cpu().double().square(), where, n).sqrt()
        largest = torch.where(sizes.isfinite(), sizes, 0.0).max()
        # A norm has no second derivative at zero. Those of other samples with such a one are there all the same.
        sizes = torch.where(sizes.isfinite(), sizes, largest if largest > 0 else 1.0)
        largest = sizes.max()
        # What is much smaller still is not scaled up any further, so that no product overflows.
        bounded = sizes.clamp(min=float(largest) * torch.finfo(x.dtype).tiny ** 0.75)
        scales = torch.where(sizes > 0, (largest / bounded).sqrt(), 0.0)
        found.append(rows_of(scales.to(x.real.dtype), x, where))
    return found


def _products(loss: Tensor, outputs: Sequence[Tensor], directions: Sequence[Tensor]) -> list[Tensor | None]:
    """The loss's second derivatives times random signs times these directions; None for outputs without."""
    nothing: list[Tensor | None] = [None] * len(outputs)
    try:
        with torch.enable_grad():
            slopes = output_gradients(loss, outputs, create_graph=True)
            pairs = [(g, d) for g, d in zip(slopes, directions, strict=True) if g is not None]
            signs = torch.Generator().manual_seed(0)
            products = ((g * d * random_signs(g.shape, g, signs)).sum().to(loss.device) for g, d in pairs)
            total = sum(products, loss.new_zeros(()))
        return output_gradients(total, outputs) if total.requires_grad else nothing
    except (RuntimeError, CurvatureError):
        return nothing
