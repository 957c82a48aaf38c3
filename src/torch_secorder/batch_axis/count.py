"""How many samples a call of the model has, and what says so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from torch_secorder.arguments import require_positive_int
from torch_secorder.batch_axis.told import LIST, NOTHING, Axis, Told
from torch_secorder.errors import ArgumentError, ShapeError
from torch_secorder.model.containers import Key, is_packed, packed_sequences, tensors


class Seen(NamedTuple):
    """A tensor among the model's arguments, or a list, that may count samples.

    Attributes:
        key: the argument's position or name.
        axis: where it would count them.
        shape: the tensor's shape; of a list, its length.
        inside: the length of the list that the tensor is in, if it is in one.
    """

    key: Key
    axis: Axis
    shape: Sequence[int]
    inside: int | None = None

    @property
    def n(self) -> int | None:
        """How many it counts; None for a tensor without that axis."""
        axis = 0 if self.axis == LIST else self.axis
        return self.shape[axis] if isinstance(axis, int) and len(self.shape) > axis else None

    def __str__(self) -> str:
        if self.axis == LIST:
            return f"the length of input {self.key!r}"
        which = f"input {self.key!r}" if self.inside is None else f"a tensor in the list that is input {self.key!r}"
        return f"axis {self.axis} of {which}, shape {tuple(self.shape)}"


@dataclass(frozen=True)
class Count:
    """How many samples a call of the model has.

    Attributes:
        n: how many, 0 for an empty batch; None if nothing says it.
        why: what says so, in words or as what was seen.
        seen: all that might say it.
        indices: the samples of rows, for tensors that have a row for something else than a sample.
        is_settled: whether the number is certain, and not read off shapes.
        is_of_bags: whether it is the number of bags of an EmbeddingBag.
        is_odd: whether shapes say nothing of the samples, since they are in ``indices`` or on another axis than the first
            argument's, so that what one batch shows is not good for others.
    """

    n: int | None = None
    why: object = "its own outputs"
    seen: tuple[Seen, ...] = ()
    indices: tuple[Tensor, ...] = ()
    is_settled: bool = False
    is_odd: bool = False
    is_of_bags: bool = False

    def __str__(self) -> str:
        return f"{self.n} samples ({self.why})"

    def inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[Seen, Tensor]]:
        """The tensors among the arguments that have as many indices as samples on the batch axis."""
        found: list[tuple[Seen, Tensor]] = []
        containers: dict[Key, Iterator[Tensor]] = {}
        for seen in self.seen:
            value = args[seen.key] if isinstance(seen.key, int) else kwargs[seen.key]
            if seen.axis == LIST:
                continue
            if not isinstance(value, Tensor):  # Of a container each tensor was seen in turn.
                if seen.key not in containers:
                    containers[seen.key] = iter(tensors(value))
                value = next(containers[seen.key])
            if seen.n == self.n:
                found.append((seen, value))
        return found

    def alternatives(self, bags: set[int]) -> list[Count]:
        """Other readings of the same arguments: one sample beside what all samples share, or bags of an EmbeddingBag."""
        if self.is_settled:
            return []
        ones = [one for one in self.seen if one.n == 1]
        found = [replace(self, n=1, why=one, is_odd=True) for one in ones[:1]]
        if len(bags) == 1:
            found.append(
                replace(self, n=next(iter(bags)), why="the bags of an EmbeddingBag", is_odd=True, is_of_bags=True)
            )
        return found


def counted(words: Told, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Count:
    """How many samples a call has, by the user's words or by the shapes of its arguments.

    A tensor of size 1 on the batch axis is shared by all samples, as position ids often are, unless all have size 1. Of several
    other sizes the first tensor's counts: masks come after what they mask. Of arguments that the user names, no others count.

    Raises:
        ShapeError: if named arguments count different numbers.
        ArgumentError: if what the user said does not fit this call.
    """
    seen = _seen(words, args, kwargs)
    if words is not NOTHING and (words.n_samples is not None or words.sample_of is not None):
        return _by_word(words, seen, args, kwargs)
    plain = not kwargs and set(map(type, args)) == {Tensor}  # It is so in most steps, which this makes faster.
    if not plain and (packed := [one for value in (*args, *kwargs.values()) for one in packed_sequences(value)]):
        return _of_packed(packed, seen)
    named = [one for one in seen if words.is_named("inputs", one.key)] if isinstance(words.inputs, Mapping) else []
    telling = named or seen
    best, n = None, None
    for one in telling:
        if n in (None, 1) and (number := one.n) is not None:
            best, n = one, number
    if best is None:
        return Count(seen=tuple(seen))
    if named and (differing := [one for one in named if one.n not in (n, 1)]):
        raise ShapeError(f"batch_axis: {best} and {differing[0]} count different numbers of samples")
    is_odd = best is not seen[0] and next(one.n for one in seen if one.n is not None) not in (n, 1)
    return Count(n, best, tuple(seen), is_settled=bool(named), is_odd=is_odd)


def _seen(words: Told, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Seen]:
    found: list[Seen] = []
    arguments: Iterable[tuple[Key, Any]] = (*enumerate(args), *kwargs.items()) if kwargs else enumerate(args)
    for key, value in arguments:
        axis = words.inputs if not isinstance(words.inputs, Mapping) else words.axis("inputs", key)
        if axis is None:
            continue
        if not isinstance(axis, int):
            found.append(Seen(key, axis, (len(value),)))
            continue
        for x in [value] if isinstance(value, Tensor) else tensors(value):
            # A nested tensor of torch's first layout shows no shape.
            shape = x.shape if not x.is_nested or x.layout == torch.jagged else (x.size(0),)
            found.append(Seen(key, axis, shape, len(value) if isinstance(value, list) else None))
    return found


def _by_word(words: Told, seen: list[Seen], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Count:
    n, why = words.n_samples, "n_samples="
    n = n(*args, **kwargs) if callable(n) else n
    n = int(n) if isinstance(n, Tensor) and n.numel() == 1 else n
    indices: tuple[Tensor, ...] = ()
    if words.sample_of is not None:
        index = _sample_of(words, args, kwargs)
        least = int(index.max()) + 1 if len(index) else 0
        if n is not None and n < least:
            raise ArgumentError(f"sample_of has rows of {least} samples, and n_samples is {n}")
        if n is None:
            _require_no_gaps(index, least)
        n, why, indices = n or least, "n_samples=" if n else "sample_of=", (index,)
    if n != 0 or words.n_samples == 0:  # A function may find that a batch is empty.
        require_positive_int("n_samples", n)
    return Count(n, why, tuple(seen), indices, is_settled=True, is_odd=True)


def _sample_of(words: Told, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    index: Any = words.sample_of
    if isinstance(index, (int, str)):
        index = words.argument(index, args, kwargs)
    elif not isinstance(index, Tensor):
        index = index(*args, **kwargs)
    whole = isinstance(index, Tensor) and not index.is_floating_point() and index.dim() == 1
    if not whole or bool((index < 0).any()):
        raise ArgumentError(
            f"sample_of must give the number of a sample, 0 or more, for each row, in a tensor of one axis, not {index!r:.80}"
        )
    return index.detach().long()


def _require_no_gaps(index: Tensor, n: int) -> None:
    """Raise where some numbers are missing: identifiers of documents count none, and graphs without nodes count one each.

    Raises:
        ArgumentError: if a number below the largest has no row.
    """
    if (named := len(index.unique())) < n:
        raise ArgumentError(
            f"sample_of has {named} different numbers, the largest of which is {n - 1}: if there are {named} samples, number "
            "them from 0 on, as torch.unique(sample_of, return_inverse=True)[1] does; if samples without a row count too, pass "
            f"n_samples={n} besides"
        )


def _of_packed(packed: Sequence[PackedSequence], seen: list[Seen]) -> Count:
    numbers = {int(one.batch_sizes[0]) for one in packed}
    if len(numbers) > 1:
        raise ShapeError(
            f"packed sequences of {' and of '.join(map(str, sorted(numbers)))} samples: which is the batch?"
        )
    (n,) = numbers
    return Count(n, "batch_sizes[0] of a packed sequence", tuple(seen), tuple(map(rows_of_packed, packed)), True, True)


def count_of(words: Told, inputs: Any) -> Count:
    """How many samples a call of a model has that gets these inputs: a tuple by position, a mapping by keyword."""
    if isinstance(inputs, Mapping):
        return counted(words, (), inputs)
    return counted(words, inputs if isinstance(inputs, tuple) and not is_packed(inputs) else (inputs,), {})


def empty_batch(count: Count) -> ShapeError:
    """The refusal of a batch without samples, by what says that it has none."""
    why = count.why
    other = f"batch_axis={{'inputs': {{{why.key!r}: None}}}}" if isinstance(why, Seen) else ""
    remedy = f", or if another input counts the samples, say that this one has none, {other}" if other else ""
    return ShapeError(f"the batch is empty: it has {count}; leave it out{remedy}")


def rows_of_packed(packed: PackedSequence) -> Tensor:
    """The sample of each row of a packed sequence's data."""
    sizes = packed.batch_sizes
    place = torch.arange(int(sizes[0]), device=sizes.device).expand(len(sizes), -1)
    index = place[place < sizes[:, None]].to(packed.data.device)
    return index if packed.sorted_indices is None else packed.sorted_indices[index]
