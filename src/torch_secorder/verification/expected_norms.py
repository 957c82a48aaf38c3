"""What a backward pass of the user's that is still to come has to find for one sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from torch_secorder.autograd.graph_pass import Gradients, GraphPass
from torch_secorder.autograd.nodes import Edge
from torch_secorder.autograd.precision import has_half_precision
from torch_secorder.autograd.sharded import GatheredWeights
from torch_secorder.errors import LifecycleError
from torch_secorder.model.parameters import Table
from torch_secorder.verification.comparison import require_equal_norms
from torch_secorder.verification.plain_autograd import as_row, squared_norms_of_sample


@dataclass(frozen=True)
class ExpectedNorms:
    """A sample's squared norms by plain autograd.

    Attributes:
        sample: the sample's number in its batch.
        positions: the parameters that have a gradient.
        alone: ``[these parameters]``.
        half: whether half precision takes part.
    """

    sample: int
    positions: list[int]
    alone: Tensor
    half: bool

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
        require_equal_norms(own, found, self.alone, half=self.half, sample=self.sample)


def expected_norms(
    loss: Tensor, outputs: Sequence[Tensor], table: Table, *, axis: int = 0, sample: int = 0
) -> ExpectedNorms:
    """Those of one sample of a loss, through the user's graph of the model's outputs, which is kept.

    Args:
        loss: the loss.
        outputs: what the model returned.
        table: the analyzed parameters; frozen ones have no gradient in the user's graph.
        axis: where the outputs have their samples.
        sample: the sample's number in its batch.

    Raises:
        LifecycleError: if the loss doesn't depend on these outputs.
    """
    gradients = _output_gradients(loss, outputs)
    pairs = [(x, g) for x, g in zip(outputs, gradients, strict=True) if g is not None and x.dim() > axis]
    if not pairs:
        raise LifecycleError("verify: the loss doesn't depend on the outputs of the model's latest call in this block")
    positions = [position for position, leaf in enumerate(table.leaves) if leaf.requires_grad]
    reached, seeds = zip(*pairs, strict=True)
    trained = [table.leaves[position] for position in positions]
    weights = GatheredWeights(throughout=table.sharded)
    norms = squared_norms_of_sample(reached, seeds, trained, sample, axis=axis, weights=weights)
    return ExpectedNorms(sample, positions, as_row(norms), has_half_precision(loss))


def _output_gradients(loss: Tensor, outputs: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient of the loss with respect to each output, None for those that it doesn't depend on."""
    edges = [get_gradient_edge(x) for x in outputs]
    arrived: dict[Edge, Tensor | None] = {}

    def arrive(node: Node, grads: Gradients) -> None:
        arrived.update({(node, nr): grad for nr, grad in enumerate(grads)})

    GraphPass([loss], {edge.node for edge in edges}).run(lambda: [torch.ones_like(loss)], arrive)
    return [arrived.get((edge.node, edge.output_nr)) for edge in edges]
