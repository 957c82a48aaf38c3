"""Where the samples of one batch are: in the model's arguments and outputs, and in the targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from torch_secorder.batch_axis.placement import Layout, Placement
from torch_secorder.batch_axis.told import LIST, NOTHING, Axis, Told
from torch_secorder.errors import ShapeError
from torch_secorder.model.containers import is_packed, mapped, parts, tensors, with_parts


@dataclass(frozen=True, eq=False)
class BatchSamples:
    """The samples of one batch.

    Attributes:
        n: how many.
        words: what the user says of where they are.
        indices: the samples of rows, for tensors that have a row for something else than a sample.
        has_bags: whether the bags of an EmbeddingBag count them.
    """

    n: int
    words: Told = NOTHING
    indices: tuple[Tensor, ...] = ()
    has_bags: bool = False

    def placements(self, side: str, value: Any) -> list[Placement | None]:
        """Where each tensor in a container has its samples; None for what all samples share.

        Args:
            side: "inputs", "outputs" or "targets".
            value: the container.
        """
        found: list[Placement | None] = []
        axes = self.words.outputs if side == "outputs" else self.words.axes(side)  # Every step asks for the outputs.
        if not isinstance(axes, Mapping):
            self._collect(value, axes, found)
            return found
        for key, part in parts(value):
            self._collect(part, self.words.axis(side, key), found)
        return found

    def _collect(self, value: Any, axis: Axis, found: list[Placement | None]) -> None:
        if isinstance(value, Tensor):
            found.append(self.placement(value, axis))
        elif self.is_list(value, axis):
            for sample, item in enumerate(value):
                found += [of_one(x, sample) for x in tensors(item)]
        else:
            for _, part in parts(value):
                self._collect(part, axis, found)

    def is_list(self, value: Any, axis: Axis) -> bool:
        """Whether something is a list with an item for each sample, by the user's word."""
        return axis == LIST and isinstance(value, (list, tuple)) and len(value) == self.n

    def placement(self, x: Tensor, axis: Axis) -> Placement | None:
        """Where a tensor has its samples, if it is on this axis.

        Raises:
            ShapeError: if it has as many rows as there are samples, and some sample has no row.
        """
        if not isinstance(axis, int) or x.dim() <= axis:
            return None
        size = x.shape[axis]
        index = next((index for index in self.indices if len(index) == size), None)
        if index is None:
            return Placement(axis) if size == self.n else None
        if size == self.n and bool((torch.bincount(index, minlength=self.n) != 1).any()):
            raise ShapeError(
                f"a tensor of shape {tuple(x.shape)} has as many rows as there are samples, {self.n}, and sample_of has samples "
                "without a row, so that its rows may be either: leave such samples out of the batch"
            )
        return Placement(axis, Layout.INDEXED, index.to(x.device))

    def of(self, x: Tensor, side: str, key: int | str = 0) -> Placement | None:
        """Where a tensor has its samples: on the axis that the user names, or else on the first one, as labels have them."""
        return self.anywhere(x, self.words.axis(side, key))

    def anywhere(self, x: Tensor, axis: Axis) -> Placement | None:
        """Where a tensor has its samples: on this axis, else on the first one; None for what all samples share."""
        return self.placement(x, axis) or (None if axis is None else self.placement(x, 0))

    def rows(self, side: str, value: Any, index: Sequence[int]) -> Any:
        """These samples of every tensor that counts samples, copied; all else as it is."""
        return self.by_axis(lambda part, axis: self._picked(part, axis, index), side, value)

    def by_axis(self, function: Callable[[Any, Axis], Any], side: str, value: Any) -> Any:
        """The same container with ``function(part, axis)`` in the place of each part of which something may be said by itself."""
        axes = self.words.axes(side)
        # They are the arguments of a call, or a single one.
        several = isinstance(value, (tuple, Mapping)) and not is_packed(value)
        if isinstance(value, Tensor) or not (several if side == "inputs" else isinstance(axes, Mapping)):
            return function(value, self.words.axis(side, 0))
        return with_parts(lambda key, part: function(part, self.words.axis(side, key)), value)

    def _picked(self, value: Any, axis: Axis, index: Sequence[int]) -> Any:
        if isinstance(value, Tensor):
            placement = self.anywhere(value, axis)
            return value if placement is None else picked(value, placement, index)
        if isinstance(value, PackedSequence):
            sequences = unpack_sequence(value)
            some = [sequences[sample] for sample in index]
            return pack_sequence(some, enforce_sorted=value.sorted_indices is None)
        if self.is_list(value, axis):
            return type(value)(value[sample] for sample in index)
        return with_parts(lambda _, part: self._picked(part, axis, index), value)

    def mapped(self, function: Callable[[Tensor, Placement | None], Tensor], side: str, value: Any) -> Any:
        """The same containers with ``function`` applied to every tensor in them and to where it has its samples."""
        return self.by_axis(lambda part, axis: self._mapped(function, part, axis), side, value)

    def _mapped(self, function: Callable[[Tensor, Placement | None], Tensor], value: Any, axis: Axis) -> Any:
        if isinstance(value, Tensor):
            return function(value, self.anywhere(value, axis))
        if self.is_list(value, axis):
            return with_parts(lambda sample, item: mapped(lambda x: function(x, of_one(x, int(sample))), item), value)
        return with_parts(lambda _, part: self._mapped(function, part, axis), value)

    @property
    def takes_no_rows(self) -> bool:
        """Whether nothing takes the arguments apart by samples: some rows are something else."""
        return bool(self.indices) or self.words.n_samples is not None or self.has_bags

    @property
    def is_one(self) -> bool:
        """Whether the arguments are those of one sample, by the user's word, with no axis for it."""
        return self.n == 1 and self.words.n_samples is not None and not self.indices

    def subset(self, index: Sequence[int]) -> BatchSamples:
        """The same for :meth:`rows` of these samples."""
        return replace(self, n=len(index), indices=tuple(rows_of_some(rows, index)[1] for rows in self.indices))


def some_has_samples(values: Sequence[Tensor], placements: Sequence[Placement | None]) -> bool:
    """Whether some differentiable tensor of these has samples."""
    return any(p is not None and x.requires_grad for x, p in zip(values, placements, strict=True))


def of_one(x: Tensor, sample: int) -> Placement:
    """The placement of a tensor that is one sample's."""
    return Placement(0, Layout.INDEXED, torch.full((len(x) if x.dim() else 1,), sample, device=x.device))


def picked(x: Tensor, placement: Placement, index: Sequence[int]) -> Tensor:
    """These samples of a tensor, copied."""
    axis, rows = placement.axis, placement.sample_index
    if x.is_nested:
        items = x.unbind()
        return torch.nested.as_nested_tensor([items[i] for i in index], layout=x.layout)
    if rows is not None:
        return x.index_select(axis, rows_of_some(rows, index)[0])
    # Copying large rows one by one is several times faster than index_select.
    return torch.cat([x.narrow(axis, sample, 1) for sample in index], axis)


def rows_of_some(sample_index: Tensor, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where some samples have their rows, some of them maybe twice, and the place among the samples of each of these rows.

    The rows of one sample follow those of another. Where the batch has a row of each sample in turn, as the three parts of a
    batch of triplets have it, they are in turn, too, so that a loss that takes the parts apart finds them.
    """
    own = [(sample_index == sample).nonzero().flatten() for sample in samples]
    places = [torch.full_like(rows, place) for place, rows in enumerate(own)]
    if _are_in_turn(sample_index):
        return torch.stack(own, 1).flatten(), torch.stack(places, 1).flatten()
    return torch.cat(own), torch.cat(places)


def _are_in_turn(sample_index: Tensor) -> bool:
    """Whether the rows are one of each sample, in some order, and then one of each in the same order, and so on."""
    n = int(sample_index.max()) + 1
    if n < 2 or len(sample_index) % n or len(sample_index) == n:
        return False
    turns = sample_index.view(-1, n)
    return bool((turns == turns[0]).all()) and len(turns[0].unique()) == n


def rows_of(values: Tensor, x: Tensor, placement: Placement) -> Tensor:
    """A value for each sample as one for each row of a tensor, in a shape that broadcasts along it."""
    rows = placement.sample_index
    values = values.to(x.device) if rows is None else values.to(x.device)[rows]
    return values.view(-1, *[1] * (x.dim() - 1 - placement.axis)) if x.dim() else values[0]
