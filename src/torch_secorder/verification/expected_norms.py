"""The squared norms that the user's next backward pass has to find for some samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from torch_secorder.autograd.product_bits import bits_of
from torch_secorder.autograd.sharded import GatheredWeights
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.model.parameters import Table
from torch_secorder.verification.comparison import require_equal_norms, rounding_beside_others
from torch_secorder.verification.plain_autograd import as_row, squared_norms_of_sample
from torch_secorder.verification.samples_alone import samples_to_check
from torch_secorder.verification.separable_graph import output_gradients, require_separable_graph

UNCHECKED = (
    "if a hook of yours changes a gradient, that is the reason, since verify calls none; without verify(loss) the pass is "
    "counted unchecked, as your loop runs it"
)


@dataclass(frozen=True)
class ExpectedNorms:
    """A sample's squared norms by plain autograd.

    Attributes:
        sample: the sample's number in its batch.
        positions: the parameters that have a gradient.
        alone: the squared norms, ``[these parameters]``.
        bits: the precision of the products that the gradients are sums of.
    """

    sample: int
    positions: list[int]
    alone: Tensor
    bits: int

    def require(self, names: Sequence[str], norms: Tensor) -> None:
        """Raise unless the pass found the same.

        Args:
            names: all parameters' names.
            norms: ``[all parameters, samples]``, the squared norms that the pass found.

        Raises:
            VerificationError: naming the parameters that differ, with both numbers.
        """
        found = norms[self.positions, self.sample]
        own = [names[position] for position in self.positions]
        rounding = rounding_beside_others(norms[self.positions], bits=self.bits)
        require_equal_norms(
            *(own, found, self.alone), bits=self.bits, rounding=rounding, sample=self.sample, unchecked=UNCHECKED
        )


def expected_norms(
    loss: Tensor, outputs: Sequence[tuple[Tensor, Placement]], n: int, table: Table
) -> list[ExpectedNorms]:
    """The expected squared norms of the first, the last and one more sample of a loss.

    Their gradients are taken through the user's graph of the model's outputs, which is not freed.

    Args:
        loss: the loss.
        outputs: what the model returned, and where each has its samples.
        n: the number of samples.
        table: the analyzed parameters; frozen ones have no gradient in the user's graph.

    Raises:
        VerificationError: if its gradient in one sample's outputs depends on other samples' outputs.
    """
    gradients = output_gradients(loss, [x for x, _ in outputs])
    triples = [(x, where, g) for (x, where), g in zip(outputs, gradients, strict=True) if g is not None]
    positions = [position for position, leaf in enumerate(table.leaves) if leaf.requires_grad]
    reached, placements, seeds = zip(*triples, strict=True)
    require_separable_graph(loss, reached, placements, n)
    trained = [table.leaves[position] for position in positions]
    weights, bits = GatheredWeights(throughout=table.sharded), bits_of([loss], table.leaves)
    found = []
    for sample in samples_to_check(n, table.ranks):
        norms = squared_norms_of_sample(reached, seeds, trained, sample, placements=placements, weights=weights)
        found.append(ExpectedNorms(sample, positions, as_row(norms), bits))
    return found
