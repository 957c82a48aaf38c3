"""Batches as loaders yield them: which part of one goes into the model, and which part the loss takes for its targets."""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from torch_secorder.approximations.progress import Progress
from torch_secorder.batch_axis.samples import BatchSamples
from torch_secorder.batch_axis.told import Told
from torch_secorder.errors import ArgumentError
from torch_secorder.model.containers import parts, tensors

Id = str | int


@dataclass(frozen=True)
class LabeledBatch:
    """One batch, taken apart.

    Attributes:
        inputs: what the model is called with.
        targets: what the loss takes beside the model's outputs.
        ids: what the samples are called, if they have names.
    """

    inputs: Any
    targets: Any
    ids: list[Id] | None = None

    def first(self, k: int, words: Told) -> LabeledBatch:
        """The batch, or its first k samples if it has more, as far as the shapes of its inputs tell.

        Raises:
            ArgumentError: if rows are not samples, by the user's word.
        """
        if words.n_samples is not None or words.sample_of is not None:
            raise ArgumentError("max_samples cuts batches by their rows, which are no samples here: use max_batches=")
        several = isinstance(self.inputs, (tuple, Mapping))
        arguments = parts(self.inputs) if several else [(0, self.inputs)]
        placed = ((words.axis("inputs", key), x) for key, argument in arguments for x in tensors(argument))
        sizes = Counter(x.size(axis) for axis, x in placed if isinstance(axis, int) and x.dim() > axis)
        n = sizes.most_common(1)[0][0] if sizes else 0
        if n <= k:
            return self
        where, chosen = BatchSamples(n, words), list(range(k))
        inputs, targets = where.rows("inputs", self.inputs, chosen), where.rows("targets", self.targets, chosen)
        return LabeledBatch(inputs, targets, None if self.ids is None else self.ids[:k])


@dataclass(frozen=True)
class Layout:
    """What the parts of a loader's batches mean.

    Attributes:
        model: the model, whose forward says what it takes.
        labels: the entry of a mapping that has the targets.
        labels_go_in: whether the model is given that entry, too, since it computes its loss itself.
        ids: where the samples' names are: the entry of a mapping, the place in a sequence, or a function of the batch.
    """

    model: nn.Module
    labels: str | None = None
    labels_go_in: bool = False
    ids: str | int | Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        if self.labels is not None and not isinstance(self.labels, str):
            raise ArgumentError(f"labels must be the name of an entry of the batches, a str, not {self.labels!r}")
        if not (self.ids is None or isinstance(self.ids, (str, int)) or callable(self.ids)) or isinstance(
            self.ids, bool
        ):
            raise ArgumentError(
                f"ids must be the name of an entry of the batches, its place in them, or a function of a batch, not {self.ids!r}"
            )

    def parts(self, batch: Any) -> LabeledBatch:
        """A batch, taken apart.

        Raises:
            ArgumentError: if the batch has not the parts that it should have; it says which, and what to do.
        """
        if isinstance(batch, Mapping):
            return self._of_mapping(batch)
        if self.labels is not None:
            raise ArgumentError(
                f"labels={self.labels!r} names an entry of batches that are mappings, and this one is a "
                f"{type(batch).__name__}: leave labels= out where batches are (inputs, targets)"
            )
        inputs, targets = batch[0], batch[1]
        if (
            self.labels_go_in
            and all(isinstance(one, Mapping) for one in (inputs, targets))
            and set(inputs) == set(targets)
        ):
            raise ArgumentError(
                "a tuple of two mappings is (inputs, targets), and a model that computes its loss itself takes no targets beside "
                "its inputs, so that the second mapping would not be used: pass a list of the two if they are two batches"
            )
        return LabeledBatch(inputs, targets, self._ids_of(batch))

    def _ids_of(self, batch: Any) -> list[Id] | None:
        """What the samples of a batch are called."""
        if self.ids is None:
            return None
        if callable(self.ids):
            found = self.ids(batch)
        else:
            try:
                found = batch[self.ids]
            except (LookupError, TypeError) as error:
                has = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else f"places 0 to {len(batch) - 1}"
                raise ArgumentError(f"ids={self.ids!r}: the batch has no such entry, but {has}") from error
        ids = found.tolist() if isinstance(found, Tensor) else found
        if not isinstance(ids, (list, tuple)) or not all(isinstance(one, (str, int)) for one in ids):
            raise ArgumentError(f"ids must be a list of names or numbers, or a tensor of integers, not {found!r:.80}")
        return list(ids)

    def _of_mapping(self, batch: Mapping[str, Any]) -> LabeledBatch:
        ids = self._ids_of(batch)
        if self.labels is None:
            return LabeledBatch(self._taken(batch), batch, ids)
        if self.labels not in batch:
            raise ArgumentError(
                f"labels={self.labels!r}: the batch has no such entry; it has {', '.join(map(str, batch))}: name the one with "
                "the targets"
            )
        inputs = batch if self.labels_go_in else {key: value for key, value in batch.items() if key != self.labels}
        return LabeledBatch(self._taken(inputs), batch[self.labels], ids)

    def _taken(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The entries without the ids, if the model takes all of them."""
        if isinstance(self.ids, str) and self.ids in inputs:
            inputs = {key: value for key, value in inputs.items() if key != self.ids}
        if unknown := [key for key in inputs if not _takes(self.model, key)]:
            pair = ", ".join(f"batch[{key!r}]" for key in [*inputs, self.labels or "labels"][:2])
            raise ArgumentError(
                f"{type(self.model).__name__}.forward takes no {', '.join(map(repr, unknown))}, which the batch has: "
                "labels= names the entry with the targets, and what else the model doesn't take has to be left out of the "
                f"batches; for a model that takes no keywords make pairs, as in (({pair}) for batch in data)"
            )
        return inputs


def _takes(model: nn.Module, key: str) -> bool:
    """Whether a model's forward takes a keyword argument. One that shows no signature may take any."""
    try:
        known = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return True
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()) or (
        key in known and known[key].kind in by_keyword
    )


def batches(data: Any, max_batches: int | None, progress: Progress | None = None) -> Iterable[Any]:
    """The batches of an iterable of them, or of one: each is a mapping, or a sequence of inputs, targets and whatever else."""
    if _is_one_batch(data):
        data = [data]
    if not isinstance(data, Iterable):
        raise ArgumentError(
            f"data must be an iterable of batches (mappings, or pairs of inputs and targets), or one of them, not a "
            f"{type(data).__name__}; a data set goes into a torch.utils.data.DataLoader"
        )
    total = len(data) if isinstance(data, Sized) else None
    if max_batches is not None:
        data, total = itertools.islice(data, max_batches), min(total or max_batches, max_batches)
    yield from map(_checked, data if progress is None else progress.over(data, total))


def while_any(left: Callable[[], int | None], batches: Iterable[Any]) -> Iterator[Any]:
    """The batches until no samples are left to count; no further one is drawn then."""
    drawn = iter(batches)
    while left() != 0:
        try:
            yield next(drawn)
        except StopIteration:
            return


def _is_one_batch(data: Any) -> bool:
    """Whether data is a batch rather than several.

    A list is several if all of its items can be batches, as those of ``[(x1, y1), (x2, y2)]`` and ``[{...}, {...}]`` can; a tuple
    of two is a pair of inputs and targets.
    """
    if isinstance(data, Mapping):
        return True
    if not _is_batch(data):
        return False
    if not all(map(_is_batch, data)):
        return isinstance(data, tuple) or len(data) == 2
    if isinstance(data, list) and all(isinstance(item, Mapping) for item in data):
        _require_same_keys(data)
    return isinstance(data, tuple) and len(data) == 2


def _require_same_keys(data: list[Mapping[str, Any]]) -> None:
    if other := next((item for item in data if set(item) != set(data[0])), None):
        raise ArgumentError(
            f"data is a list of mappings with different entries ({', '.join(map(str, data[0]))}; {', '.join(map(str, other))}), "
            "so that it can't be told to be several batches: a tuple (inputs, targets) is one batch, and the batches of a list "
            "have the same entries"
        )


def _is_batch(value: Any) -> bool:
    """Whether something can be a batch: a mapping, or inputs and targets with whatever follows them."""
    return isinstance(value, Mapping) or (isinstance(value, (tuple, list)) and len(value) >= 2)


def _checked(batch: Any) -> Any:
    """A batch that can be one."""
    if not _is_batch(batch):
        raise ArgumentError(
            f"data must yield mappings or pairs (inputs, targets), not a {type(batch).__name__}; make pairs of what it yields, "
            "as in ((batch.x, batch.y) for batch in data), and ((x, None) for x in data) where there are no targets"
        )
    if isinstance(batch, Mapping) and not batch:
        raise ArgumentError(
            "data has a batch without any entry: give the model's inputs by the names that its forward has"
        )
    return batch
