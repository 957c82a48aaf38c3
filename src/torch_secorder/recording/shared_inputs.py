"""Factors that several calls with the same input share, computed once for all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from torch_secorder.capture.records import Record
from torch_secorder.per_sample import SharedFactor


@dataclass(eq=False)
class SharedInputs:
    """The inputs that several calls of one backward pass got."""

    # The id of an input -> the input, how many of its uses are left, and what they share.
    _left: dict[int, tuple[Any, int, dict[torch.Size, SharedFactor]]] = field(default_factory=dict)

    def factors_of(self, record: Record) -> dict[torch.Size, SharedFactor] | None:
        """The factors that this call shares with others that got the same input; the last of these calls removes them."""
        if not record.inputs or record.inputs_packed or record.forward.recomputed_in is not None:
            return None
        x, uses = record.inputs[0], record.forward.input_uses.get(id(record.inputs[0]), 0)
        if uses < 2:
            return None
        # The entry keeps the input alive, so that no other tensor gets its id. The count may include tensors that had it before.
        same, left, factors = self._left.pop(id(x), (x, uses, {}))
        assert same is x
        if left > 1:
            self._left[id(x)] = x, left - 1, factors
        return factors
