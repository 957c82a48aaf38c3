"""Every t_{n,p}: the squared norms as they are, sample by sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from torch_secorder.recording.quantities.quantity import Part, Quantity


class SampleRows(Quantity):
    """The squared norms of every sample, in the order of the backward passes.

    Attributes:
        blocks: those of each pass, ``[n, p]``.
    """

    name: ClassVar[str] = "per_sample"

    def __init__(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]], how: Any = True):
        super().__init__(names, shapes, how)
        self.blocks: list[Tensor] = []

    def add(self, part: Part, t: Tensor, scale: float) -> None:
        self.blocks = [*self.blocks, t.T]

    def merge(self, other: SampleRows) -> None:
        self.blocks = [*self.blocks, *other.blocks]

    def state(self) -> dict[str, Any]:
        return {"rows": [value.clone() for value in self.blocks]}

    def load(self, state: Mapping[str, Any]) -> None:
        self.blocks = [value.clone() for value in state["rows"]]
