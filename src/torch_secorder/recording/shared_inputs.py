"""What calls that got the same input have in common, computed once for all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from torch_secorder.capture.records import Record
from torch_secorder.per_sample import SharedFactor


@dataclass(eq=False)
class SharedInputs:
    """The inputs of one backward pass's calls that several calls got."""

    # The id of an input -> the input, how many of its uses are left, and what they share.
    _left: dict[int, tuple[Any, int, dict[torch.Size, SharedFactor]]] = field(default_factory=dict)

    def factors_of(self, record: Record) -> dict[torch.Size, SharedFactor] | None:
        """What this call has in common with those that got the same input; forgotten with the last of them."""
        if not record.inputs or record.inputs_packed or record.forward.recomputed_in is not None:
            return None
        x, uses = record.inputs[0], record.forward.input_uses.get(id(record.inputs[0]), 0)
        if uses < 2:
            return None
        # The entry keeps the input, so that no other tensor can get its id; the count may include some that had it before.
        same, left, factors = self._left.pop(id(x), (x, uses, {}))
        assert same is x
        if left > 1:
            self._left[id(x)] = x, left - 1, factors
        return factors
