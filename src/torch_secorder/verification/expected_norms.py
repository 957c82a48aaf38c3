"""What a backward pass of the user's that is still to come has to find for some samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from torch_secorder.autograd.graph_pass import Gradients, GraphPass
from torch_secorder.autograd.nodes import Edge
from torch_secorder.autograd.product_bits import bits_of
from torch_secorder.autograd.sharded import GatheredWeights
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.batch_axis.samples import rows_of
from torch_secorder.errors import CurvatureError, LifecycleError
from torch_secorder.likelihoods import random_signs
from torch_secorder.model.parameters import Table
from torch_secorder.verification.comparison import require_equal_norms
from torch_secorder.verification.plain_autograd import as_row, squared_norms_of_sample
from torch_secorder.verification.samples_alone import samples_to_check
from torch_secorder.verification.selections import coupling_loss, selects_among_samples
from torch_secorder.verification.tolerances import SEPARABLE_LOSS


@dataclass(frozen=True)
class ExpectedNorms:
    """A sample's squared norms by plain autograd.

    Attributes:
        sample: the sample's number in its batch.
        positions: the parameters that have a gradient.
        alone: ``[these parameters]``.
        bits: of the numbers that the gradients are sums of.
    """

    sample: int
    positions: list[int]
    alone: Tensor
    bits: int

    def require(self, names: Sequence[str], norms: Tensor) -> None:
        """Raise unless the pass found the same.

        Args:
            names: all parameters' names.
            norms: ``[all parameters, samples]``, what the pass found.

        Raises:
            VerificationError: naming the parameters that differ, with both numbers.
        """
        found = norms[self.positions, self.sample]
        own = [names[position] for position in self.positions]
        require_equal_norms(own, found, self.alone, bits=self.bits, sample=self.sample)


def expected_norms(
    loss: Tensor, outputs: Sequence[tuple[Tensor, Placement]], n: int, table: Table
) -> list[ExpectedNorms]:
    """What to expect of the first, the last and one more sample of a loss.

    Their gradients are taken through the user's graph of the model's outputs, which is kept.

    Args:
        loss: the loss.
        outputs: what the model returned, and where each has its samples.
        n: how many samples.
        table: the analyzed parameters; frozen ones have no gradient in the user's graph.

    Raises:
        LifecycleError: if the loss doesn't depend on these outputs.
        VerificationError: if its gradient in one sample's outputs depends on other samples' outputs.
    """
    gradients = _output_gradients(loss, [x for x, _ in outputs])
    triples = [(x, where, g) for (x, where), g in zip(outputs, gradients, strict=True) if g is not None]
    if not triples:
        raise LifecycleError("verify: the loss doesn't depend on the outputs of the model's latest call in this block")
    positions = [position for position, leaf in enumerate(table.leaves) if leaf.requires_grad]
    reached, placements, seeds = zip(*triples, strict=True)
    _require_separable(loss, reached, placements, n)
    trained = [table.leaves[position] for position in positions]
    weights, bits = GatheredWeights(throughout=table.sharded), bits_of([loss], table.leaves)
    found = []
    for sample in samples_to_check(n, table.ranks):
        norms = squared_norms_of_sample(reached, seeds, trained, sample, placements=placements, weights=weights)
        found.append(ExpectedNorms(sample, positions, as_row(norms), bits))
    return found


def _require_separable(loss: Tensor, outputs: Sequence[Tensor], placements: Sequence[Placement], n: int) -> None:
    """Raise if the loss selects among samples, or has second derivatives between the outputs of different ones.

    An operation that has none shows nothing. Any two samples are in different halves for some digit of their numbers.
    """
    if selects_among_samples(loss, outputs, n, placements):
        raise coupling_loss()
    numbers = torch.arange(n, device="cpu")
    for digit in range((n - 1).bit_length()):
        _require_separable_halves(loss, outputs, placements, (numbers >> digit) % 2 == 1)


def _require_separable_halves(
    loss: Tensor, outputs: Sequence[Tensor], placements: Sequence[Placement], half: Tensor
) -> None:
    """Raise if the loss has second derivatives between the outputs of two halves of the samples."""
    masks = [rows_of(half, x, where) for x, where in zip(outputs, placements, strict=True)]
    try:
        with torch.enable_grad():
            slopes = _output_gradients(loss, outputs, create_graph=True)
            pairs = [(g, m) for g, m in zip(slopes, masks, strict=True) if g is not None]
            signs = torch.Generator().manual_seed(0)
            products = ((g * m * random_signs(g.shape, g, signs)).sum().to(loss.device) for g, m in pairs)
            total = sum(products, loss.new_zeros(()))
        if not total.requires_grad:
            return
        curved = _output_gradients(total, outputs)
    except (RuntimeError, CurvatureError):
        return
    own = max((float((c * m).norm()) for c, m in zip(curved, masks, strict=True) if c is not None), default=0.0)
    across = max((float((c * ~m).norm()) for c, m in zip(curved, masks, strict=True) if c is not None), default=0.0)
    if across > SEPARABLE_LOSS * own:
        raise coupling_loss()


def _output_gradients(loss: Tensor, outputs: Sequence[Tensor], *, create_graph: bool = False) -> list[Tensor | None]:
    """The gradient of the loss with respect to each output, None for those that it doesn't depend on.

    An output may have been computed from another one. What the loss gets through it is none of the other's own.
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
