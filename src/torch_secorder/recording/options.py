"""What the backward passes of a recorder collect."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PassOptions:
    """What the backward passes of a recorder collect, decided once for all of them.

    Attributes:
        quantities: what is taken besides squared norms: the name of a quantity -> what of it is kept, True for all.
        repeated_calls: what two calls of the model that one backward pass reaches are: "same" or "new" samples; None refuses.
        max_memory: how many bytes the algebra may take for its temporaries at once.
    """

    quantities: Mapping[str, Any] = field(default_factory=dict)
    repeated_calls: str | None = None
    max_memory: int | None = None

    @property
    def kind(self) -> Hashable:
        """The same for options with which passes are taken apart in the same way."""
        return *self.quantities, self.repeated_calls, self.max_memory
