"""Every t_{n,p}: the squared norms as they are, sample by sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from torch_secorder.recording.quantities.quantity import Part, Quantity

Id = str | int | None


class SampleIds(Part):
    """The names of the samples of one pass.

    Attributes:
        ids: a name or a number for each.
    """

    def __init__(self, ids: Sequence[Id]):
        self.ids = list(ids)

    def finite(self, bad: Tensor, names: Sequence[str]) -> SampleIds:
        return SampleIds([one for one, out in zip(self.ids, bad.any(0).tolist(), strict=True) if not out])


class SampleRows(Quantity):
    """The squared norms of every sample, in the order of the backward passes.

    Attributes:
        blocks: the squared norms of each pass, ``[n, p]``.
        ids: the names of each pass's samples, None for a sample without a name.
    """

    name: ClassVar[str] = "per_sample"

    def __init__(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]], how: Any = True):
        super().__init__(names, shapes, how)
        self.blocks: list[Tensor] = []
        self.ids: list[list[Id]] = []

    def add(self, part: Part, t: Tensor, scale: float) -> None:
        ids: list[Id] = part.ids if isinstance(part, SampleIds) else [None] * t.shape[1]
        self.ids, self.blocks = [*self.ids, ids], [*self.blocks, t.T]

    def merge(self, other: SampleRows) -> None:
        self.ids, self.blocks = [*self.ids, *other.ids], [*self.blocks, *other.blocks]

    def state(self) -> dict[str, Any]:
        return {"rows": [value.clone() for value in self.blocks], "ids": [list(ids) for ids in self.ids]}

    def load(self, state: Mapping[str, Any]) -> None:
        self.blocks = [value.clone() for value in state["rows"]]
        self.ids = [list(ids) for ids in state["ids"]] or [[None] * len(block) for block in self.blocks]
