"""What the backward passes of a recorder collect."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PassOptions:
    """What the backward passes of a recorder collect, decided once for all of them.

    Attributes:
        quantities: what is kept besides squared norms: the name of a quantity -> which part of it is kept, True for all of it.
        repeated_calls: whether two calls of the model that one backward pass reaches are of the "same" samples or of "new" ones;
            None refuses them.
        max_memory: how many bytes the algebra's temporaries may take at once.
    """

    quantities: Mapping[str, Any] = field(default_factory=dict)
    repeated_calls: str | None = None
    max_memory: int | None = None

    @property
    def kind(self) -> Hashable:
        """A key that is equal for options under which passes are taken apart in the same way."""
        return *self.quantities, self.repeated_calls, self.max_memory
