"""Squared norms in which digits may have cancelled. On an accelerator they are checked together when the pass is over.

Checking each layer at once would make the host wait for the device in the middle of the pass, once per layer. So the factors
of whatever may have to be recomputed are kept until the end, within a budget. A layer beyond the budget takes the direct form,
in which nothing cancels; so does, from then on, a layer that has cancelled once. On a CPU every layer is checked at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_secorder.autograd.double_precision import together_on_host
from torch_secorder.autograd.versions import versions
from torch_secorder.errors import CoverageError
from torch_secorder.per_sample import (
    PerSampleGradient,
    cancellation_floor,
    direct_squared_norms_of,
    norms_of,
    squared_norms_of,
    unguarded_squared_norms_of,
)
from torch_secorder.recording.batch import SampleBatch
from torch_secorder.recording.quantities import Part

# How many bytes may be kept where the user sets no limit.
KEPT_BYTES = 2**28


def kept_bytes(max_memory: int | None) -> int:
    """How many bytes may be kept until a pass is over: half of the limit, if there is one."""
    return KEPT_BYTES if max_memory is None else max_memory // 2


@dataclass(frozen=True, eq=False)
class Doubt:
    """Squared norms that may have cancelled.

    Attributes:
        batches: for each position, the batch that the samples belong to.
        positions: the positions of k parameters.
        sizes: the size of the summands, ``[k n]``.
        form: the gradients, of ``k n`` samples.
        versions: the version counters of its factors, to notice later changes in place.
    """

    batches: Sequence[SampleBatch]
    positions: Sequence[int]
    sizes: Tensor
    form: PerSampleGradient
    versions: tuple[int, ...]


class Doubts:
    """The doubtful squared norms of one backward pass.

    Args:
        names: the parameters' names.
        cancelled: the names of parameters that have cancelled before; more are added.
        budget: how many bytes may be kept.
    """

    def __init__(self, names: Sequence[str], cancelled: set[str], budget: int):
        self._names, self._cancelled, self._left = names, cancelled, budget
        self._doubts: list[Doubt] = []

    def squared_norms(
        self, batches: Sequence[SampleBatch], positions: Sequence[int], form: PerSampleGradient
    ) -> Tensor:
        """A form's squared norms, final or noted for a later check; or its norms, whose positions the batches note as roots.

        Args:
            batches: for each position, the batch that the samples belong to.
            positions: the parameters' positions; the form has the samples of the first, then of the second, and so on.
            form: the gradients.
        """
        if form.like.device.type == "cpu":  # The model may be on several devices.
            return squared_norms_of(form)
        if not form.may_cancel:
            if (roots := norms_of(form)) is None:
                return squared_norms_of(form)
            for batch, position in zip(batches, positions, strict=True):
                batch.roots.add(position)
            return roots
        factors = list(_tensors(form))
        size = sum(x.numel() * x.dtype.itemsize for x in factors)
        if size > self._left or not self._cancelled.isdisjoint(self._names[position] for position in positions):
            return direct_squared_norms_of(form)
        norms, sizes = unguarded_squared_norms_of(form)
        if sizes is not None:
            self._left -= size
            self._doubts.append(Doubt(batches, positions, sizes, form, versions(factors)))
        return norms

    def answered(self, values: Sequence[Tensor]) -> list[Tensor]:
        """These tensors on the host; the doubts' sizes travel there in the same copy."""
        found = together_on_host([*values, *(doubt.sizes for doubt in self._doubts)])
        self._sizes = found[len(values) :]
        return found[: len(values)]

    def recompute(self, norms: Tensor, columns: Mapping[SampleBatch, slice]) -> None:
        """Square the norms that are still roots, and recompute what has cancelled, in place.

        Args:
            norms: ``[parameters, samples]``, on the host.
            columns: where the samples of each batch are.

        Raises:
            CoverageError: if factors were changed in place since.
        """
        for batch, samples in columns.items():
            roots = list(batch.roots)
            norms[roots, samples] = norms[roots, samples].square()
        lost: list[tuple[Doubt, list[int], Tensor]] = []
        for doubt, sizes in zip(self._doubts, self._sizes, strict=True):
            own = torch.cat([norms[p, columns[b]] for p, b in zip(doubt.positions, doubt.batches, strict=True)])
            rows = (own < cancellation_floor(doubt.sizes) * sizes).nonzero().flatten().tolist()
            if rows:
                lost.append((doubt, rows, self._direct(doubt, rows)))
        self._doubts = []
        for (doubt, rows, _), found in zip(lost, together_on_host([values for *_, values in lost]), strict=True):
            n = len(doubt.sizes) // len(doubt.positions)
            for row, value in zip(rows, found.tolist(), strict=True):
                index = row // n
                norms[doubt.positions[index], columns[doubt.batches[index]].start + row % n] = value
            self._cancelled.update(self._names[doubt.positions[row // n]] for row in rows)

    def _direct(self, doubt: Doubt, rows: list[int]) -> Tensor:
        if versions(_tensors(doubt.form)) != doubt.versions:
            names = ", ".join(self._names[position] for position in doubt.positions)
            raise CoverageError(
                f"{names}: digits have cancelled, and the layer's input or the gradient of its output was changed in place "
                "before the backward pass was over, by a hook or a backward of the user's that gets the same tensor; return a "
                "new one there"
            )
        index = torch.tensor(rows, device=doubt.form.like.device)
        return direct_squared_norms_of(doubt.form.select(index))


def on_the_host(
    doubts: Doubts, parts: dict[str, Part], stacked: list[tuple[list[int], Tensor]], gradient_norms: Tensor | None
) -> tuple[list[tuple[list[int], Tensor]], Tensor | None]:
    """Squared norms and norms of gradients in float64 on the host, where the parts' tensors go in the same copy."""
    norms = [] if gradient_norms is None else [gradient_norms]
    read = {name: part.tensors() for name, part in parts.items()}
    found = iter(doubts.answered([*(values for _, values in stacked), *norms, *itertools.chain(*read.values())]))
    stacked = [(positions, next(found)) for positions, _ in stacked]
    gradient_norms = next(found) if norms else None
    for name, tensors in read.items():
        parts[name] = parts[name].with_tensors(itertools.islice(found, len(tensors)))
    return stacked, gradient_norms


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors that a form is made of."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (PerSampleGradient, list)):
        for part in value if isinstance(value, list) else vars(value).values():
            yield from _tensors(part)
