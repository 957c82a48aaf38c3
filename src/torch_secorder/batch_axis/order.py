"""The order of samples in graphs of one kind: what decides where they are, besides the kind."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Order:
    """What decides where graphs of one kind have their samples.

    Attributes:
        movers: the nodes whose settings and indices decide it, by their numbers in the walk, each with the places of the indices
            that do; None if some of them are inside of hooked calls, where they are not compared.
        is_derived: whether it follows from these and from the kinds and shapes of all nodes. It does not where numbers decide, as
            those of a mask or of a matrix of zeros and ones, or a node of a kind that is not known.
        as_shapes_say: whether all calls have their samples where their shapes suggest.
        may_change: whether the samples may be in another order in another graph of the kind.
    """

    movers: frozenset[tuple[int, tuple[int, ...] | None]] | None = frozenset()
    is_derived: bool = True
    as_shapes_say: bool = True
    may_change: bool = field(init=False)

    def __post_init__(self) -> None:
        # Every step asks for it, so that it is no property.
        object.__setattr__(self, "may_change", bool(self.movers is None or self.movers or not self.is_derived))

    def joined(self, other: Order) -> Order:
        """What decides it where both were found for graphs of one kind."""
        movers = None if self.movers is None or other.movers is None else self.movers | other.movers
        derived = self.is_derived and other.is_derived
        return Order(movers, derived, self.as_shapes_say and other.as_shapes_say)


ONE_ORDER = Order()
