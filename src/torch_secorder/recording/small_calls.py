"""Small calls of one kind are computed together, since starting an operation costs as much as reading their tensors."""

from __future__ import annotations

import operator
from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import Tensor

from torch_secorder.autograd.versions import version
from torch_secorder.batch_axis.placement import FIRST
from torch_secorder.capture.records import SMALL, Record
from torch_secorder.errors import CoverageError
from torch_secorder.per_sample import squared_norms_of_each
from torch_secorder.recording.batch import SampleBatch
from torch_secorder.recording.doubts import Doubts

MOST_CALLS = 64  # At most this many calls wait for each other.


@dataclass(eq=False)
class SmallCallBatch:
    """Calls that wait for others of their kind.

    Attributes:
        rules: position -> how its numbers were computed; this adds to it.
        keep_inputs: whether the records keep their inputs.
        doubts: keeps what may have cancelled; with None, cancellation is looked for at once.
    """

    rules: dict[int, dict[str, None]]
    keep_inputs: bool
    doubts: Doubts | None
    _waiting: dict[Hashable, list[tuple[SampleBatch, Record, Tensor, int]]] = field(default_factory=dict)

    def add(self, batch: SampleBatch, record: Record, grad: Tensor) -> bool:
        """Keep a small call until there are others of its kind; returns whether it was kept. Its parameters have no other call.

        Args:
            batch: the batch that the samples belong to.
            record: the call.
            grad: the gradient of its output.
        """
        key, calls = _kind(record, grad), record.forward.calls
        if key is None or not record.forward.in_model_call:
            return False
        for position in record.site.positions:
            if calls[position] > 1 or position in batch.settled:
                return False
        batch.settled.update(record.site.positions)
        waiting = self._waiting.setdefault(key, [])
        waiting.append((batch, record, grad, version(grad)))
        if len(waiting) == MOST_CALLS:
            self._compute(self._waiting.pop(key))
        return True

    def finish(self) -> None:
        """Take the norms of all calls that still wait."""
        for key in list(self._waiting):
            self._compute(self._waiting.pop(key))

    def _compute(self, waiting: list[tuple[SampleBatch, Record, Tensor, int]]) -> None:
        for _, record, grad, seen in waiting:
            if version(grad) != seen:
                raise CoverageError(
                    f"{record.site}: the gradient of its output was changed in place after it had arrived, by a hook or a "
                    "backward of the user's that gets the same tensor; return a new one there"
                )
        batches, records, grads, _ = zip(*waiting, strict=True)
        site, owned = records[0].site, list(map(operator.attrgetter("site.parameters"), records))
        forms = site.forms(Record.concatenated(records, grads))
        together = squared_norms_of_each(forms) if self.doubts is None else {}
        for local, form in forms.items():
            rule = {f"{site.rule.name} ({form.algorithm})": None}
            positions = list(map(operator.itemgetter(local), owned))
            self.rules.update(dict.fromkeys(positions, rule))
            norms = together[local] if self.doubts is None else self.doubts.squared_norms(batches, positions, form)
            norms = norms.unflatten(0, (len(waiting), -1))
            if len(set(map(id, batches))) == 1:
                batches[0].batched.append((positions, norms))
                continue
            for batch, position, own in zip(batches, positions, norms, strict=True):
                batch.squared_norms[position] = own
        if not self.keep_inputs:
            for record in records:
                record.inputs = None


def _kind(record: Record, grad: Tensor) -> Hashable | None:
    """A key that is equal for small calls that can be computed together: one rule, settings and shapes; None for other calls."""
    site, inputs, rule = record.site, record.inputs, record.site.rule
    if grad.numel() > SMALL or grad.numel() != record.shape.numel() or record.kwargs or not record.in_output_graph:
        return None
    if rule.depends_on is None or (record.placement is not FIRST and record.placement != FIRST):
        return None
    if inputs is None or len(inputs) != 1 or not isinstance(inputs[0], Tensor) or inputs[0].numel() > SMALL:
        return None
    x, names = inputs[0], rule.depends_on
    settings = tuple([getattr(site.module, name) for name in names]) if names else ()
    return (rule.function, site.shapes_by_name, settings, x.shape, x.dtype, record.shape, grad.dtype, grad.device)
