"""What decides how a graph is searched for its samples."""

from __future__ import annotations

from typing import NamedTuple

from torch_secorder.batch_axis.order import Order
from torch_secorder.graph.walk import Walk
from torch_secorder.model.ranks import Ranks


class Questions(NamedTuple):
    """What decides how a graph is searched. Ranks that hold the model together decide in common.

    Attributes:
        several_samples: whether there is more than one sample.
        reorders_samples: whether the samples may be in another order in each batch, so that nothing that was found in
            other batches holds for this one, nor the other way round.
        ambiguous_shapes: whether shapes leave open where the samples are.
        uses_outside_calls: whether some parameter is used outside of its module's call.
    """

    several_samples: bool
    reorders_samples: bool
    ambiguous_shapes: bool
    uses_outside_calls: bool

    @classmethod
    def of(cls, walk: Walk, n: int, order: Order, *, is_odd: bool = False) -> Questions:
        """The answers for one graph of n samples.

        Where rows are something else than samples, no shape shows anything, and no batch shows it for others.
        """
        reorders = order.may_change or is_odd
        ambiguous = reorders or walk.has_ambiguous_axis or not order.as_shapes_say
        for record, _ in walk.calls:
            ambiguous = ambiguous or record.placement is None
        return cls(n > 1, reorders, ambiguous, bool(walk.uses))

    def on_any(self, ranks: Ranks) -> Questions:
        """For each question whether any rank says yes."""
        return Questions(*map(bool, ranks.max_each_over_ranks(self)))
