"""Small calls of one kind, put together: an operation costs as much as reading what they have."""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor

from torch_secorder.autograd.versions import version
from torch_secorder.capture.records import Record
from torch_secorder.errors import CoverageError
from torch_secorder.recording.batch import Block, forms_of, norms_of

TOGETHER = 64  # calls, at most


class SmallCallBatch:
    """Calls that wait for others of their kind.

    Args:
        rules: position -> how its numbers were computed, to add to.
        keep: leave the records' inputs alone.
    """

    def __init__(self, rules: dict[int, dict[str, None]], *, keep: bool):
        self._rules, self._keep = rules, keep
        self._waiting: dict[Hashable, list[tuple[Block, Record, Tensor, int]]] = {}

    def add(self, kind: Hashable, block: Block, record: Record, grad: Tensor) -> None:
        """A call of a kind, and the gradient of its output."""
        waiting = self._waiting.setdefault(kind, [])
        waiting.append((block, record, grad, version(grad)))
        if len(waiting) == TOGETHER:
            self._together(kind)

    def finish(self) -> None:
        """Take the norms of all that still wait."""
        for kind in list(self._waiting):
            self._together(kind)

    def _together(self, kind: Hashable) -> None:
        waiting = self._waiting.pop(kind)
        for _, record, grad, seen in waiting:
            if version(grad) != seen:
                raise CoverageError(
                    f"{record.site}: the gradient of its output was changed in place after it had arrived, by a hook or a "
                    "backward of the user's that gets the same tensor; return a new one there"
                )
        blocks, records, grads, _ = zip(*waiting, strict=True)
        site = records[0].site
        for local, form in forms_of(site, Record.joined(records, grads)).items():
            rule = {f"{site.rule.name} ({form.algorithm})": None}
            positions = [record.site.parameters[local] for record in records]
            self._rules.update(dict.fromkeys(positions, rule))
            norms = norms_of(form).view(len(waiting), -1)
            if len(set(map(id, blocks))) == 1:
                blocks[0].several.append((positions, norms))
                continue
            for block, position, own in zip(blocks, positions, norms, strict=True):
                block.norms[position] = own
        if not self._keep:
            for record in records:
                record.inputs = None
