"""The Fisher diagonal: per-sample gradients squared entry by entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from torch_secorder.autograd.double_precision import on_host
from torch_secorder.errors import NonFiniteError, listed
from torch_secorder.model.channels import ChannelSums
from torch_secorder.per_sample import PerSampleGradient, SquareSum, halving_on_oom
from torch_secorder.recording.quantities.layout import Layout, is_kept, sums_in
from torch_secorder.recording.quantities.quantity import Part, Quantity


class DiagonalPart(Part):
    """``sum_n G_n ** 2`` of one backward pass for each position in the parameter table, factored where that is possible.

    Args:
        sums: position -> the sum, in several parts.
        channels: for each parameter that is kept, its position -> the channels to add up over, or None for all entries. None
            in place of the mapping keeps every entry of all parameters.
    """

    def __init__(
        self,
        sums: dict[int, list[SquareSum]] | None = None,
        channels: Mapping[int, ChannelSums | None] | None = None,
    ):
        self.sums = {} if sums is None else sums
        self._channels = channels
        # What :meth:`squared_norms` has computed with the norms, for :meth:`on_form`.
        self._by_sample: dict[int, Tensor] = {}
        self._by_entry: dict[int, Tensor] = {}

    def squared_norms(self, position: int, form: PerSampleGradient) -> Tensor | None:
        if self._channels is not None and position not in self._channels:
            return None
        channels = None if self._channels is None else self._channels[position]
        if channels is None:
            found = halving_on_oom(form, lambda part: part.squares_and_norms(), _both_sums)
            if found is not None:
                self._by_entry[position] = found[0]
            return None if found is None else found[1]
        if not form.shares_norms_with(channels):
            return None
        both = halving_on_oom(form, lambda part: part.sample_channel_squares(channels), lambda a, b: torch.cat([a, b]))
        self._by_sample[position] = both.detach()
        return both.sum(1)

    def on_form(self, position: int, form: PerSampleGradient, squared_norms: Tensor) -> None:
        if self._channels is not None and position not in self._channels:
            return
        channels = None if self._channels is None else self._channels[position]
        if (by_sample := self._by_sample.pop(position, None)) is not None:
            sums = by_sample.masked_fill(~squared_norms.isfinite()[:, None], 0).sum(0)
            self.sums.setdefault(position, []).append(SquareSum(sums, tuple(sums.shape)))
        elif (by_entry := self._by_entry.pop(position, None)) is not None:
            self.sums.setdefault(position, []).append(SquareSum(by_entry, tuple(by_entry.shape)))
        elif (finite := finite_samples(form, squared_norms)) is not None:
            square_sum = partial(SquareSum.of, channels=channels)
            new = halving_on_oom(finite, square_sum, lambda a, b: SquareSum.summed([a, b]))
            self.sums.setdefault(position, []).append(new)

    def scaled(self, factor: float) -> DiagonalPart:
        sums = {position: [one.times(factor) for one in found] for position, found in self.sums.items()}
        return DiagonalPart(sums, self._channels)

    def plus(self, other: DiagonalPart) -> DiagonalPart:
        both = {p: [SquareSum.summed([*self.sums.get(p, []), *found])] for p, found in other.sums.items()}
        return DiagonalPart(self.sums | both, self._channels)

    def finite(self, bad: Tensor, names: Sequence[str]) -> DiagonalPart:
        rows = bad.any(0)
        late = next((p for p in self.sums if bool(rows.logical_and(~bad[p]).any())), None)
        if late is not None:
            raise NonFiniteError(
                f"{listed(rows.nonzero().flatten().tolist(), 'sample')}: the gradient became infinite half-way through the "
                f"backward pass, after {names[late]} had been added to the diagonal; the batch is left out"
            )
        return self


def _both_sums(a: tuple[Tensor, Tensor] | None, b: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    """Sums of squares over the samples of two halves, and the squared norms of all."""
    return None if a is None or b is None else (a[0] + b[0], torch.cat([a[1], b[1]]))


def finite_samples(form: PerSampleGradient, norms: Tensor) -> PerSampleGradient | None:
    """The gradients of the samples with finite norms, None if there are none; on an accelerator the others become zeros."""
    if norms.device.type != "cpu":
        return form.without((norms * 0).ne(0))
    finite = norms.isfinite()
    if bool(finite.all()):
        return form
    return form.select(finite.nonzero().squeeze(1)) if bool(finite.any()) else None


# How many passes are added up in single precision before their sum moves to the host. Each addition is off by at most 2^-24 of
# the sum, so this many are off by 1e-5 of it at most, a tenth of what the library promises.
PASSES_IN_SINGLE = 128


@dataclass(frozen=True, eq=False)
class _Sum:
    """The sum of one parameter's squares over passes.

    Attributes:
        recent: the sum of the latest passes; a single zero if none of them has reached the parameter.
        passes: how many passes ``recent`` has.
        settled: the sum of all passes before them, in float64 on the host; None if there are none.
    """

    recent: Tensor
    passes: int = 0
    settled: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """The whole sum, in the dtype and on the device of the recent one."""
        return self.recent if self.settled is None else (self.settled + on_host(self.recent)).to(self.recent)

    def with_room(self, passes: int) -> _Sum:
        """The same sum, settled first if its recent part has no room for so many more passes."""
        if self.passes + passes <= PASSES_IN_SINGLE or self.recent.dtype == torch.float64:
            return _Sum(self.recent, self.passes + passes, self.settled)
        return _Sum(self.recent.new_zeros(()), passes, _both(self.settled, on_host(self.recent)))

    def plus_pass(self, one: SquareSum) -> _Sum:
        """The sum with one more pass, added in place where there is a tensor of the parameter's shape."""
        room = self.with_room(1)
        # A 0-dim sum stands for a parameter that no pass has reached, or is that of a single number.
        if room.recent.dim():
            value = one.added(room.recent.to(one.device))  # a loaded sum is on the host
        else:
            new = one.added(None)
            value = new if new.dim() else new + room.recent.to(new.device)
        return _Sum(value, room.passes, room.settled)

    def plus(self, other: _Sum) -> _Sum:
        """The sum with the passes of another one."""
        room = self.with_room(other.passes)
        theirs = other.recent.to(room.recent.device) if room.recent.dim() else other.recent
        settled = room.settled if other.settled is None else _both(room.settled, other.settled)
        return _Sum(theirs + room.recent.to(theirs.device), room.passes, settled)


class Diagonal(Quantity):
    """``sum_n g_n ** 2``, a tensor for each parameter, or the sums of its entries over each channel.

    A sum in single precision stops growing once a pass adds less than its last digit. The sums of 128 passes are therefore
    added up in float64, on the host. A short run takes the memory of one number for each entry; a long one also takes twice
    that on the host. Sums that are in float64 anyway stay where they are.

    Args:
        names: the parameters.
        shapes: their shapes.
        how: what is kept for which parameter.
    """

    name: ClassVar[str] = "diagonal"
    takes_forms: ClassVar[bool] = True

    def __init__(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]], how: Layout = True):
        super().__init__(names, shapes, how)
        self._sums: list[_Sum] = []
        self._layout = how

    @staticmethod
    def part(names: Sequence[str], how: Layout) -> DiagonalPart:
        if isinstance(how, bool):
            return DiagonalPart()
        kept = {position: sums_in(how, name) for position, name in enumerate(names) if is_kept(how, name)}
        return DiagonalPart(channels=kept)

    @property
    def totals(self) -> list[Tensor]:
        """The sums, in at least float32; a single zero for a parameter that was never reached; empty before the first pass."""
        return [one.total for one in self._sums]

    def add(self, part: DiagonalPart, t: Tensor, scale: float) -> None:
        self.torn = True
        self._sums = list(self._sums) or self._nothing()
        for position, several in part.sums.items():
            for one in several:
                self._sums[position] = self._sums[position].plus_pass(one.times(scale))
        self.torn = False

    def _nothing(self) -> list[_Sum]:
        return [_Sum(torch.zeros((), dtype=torch.float32, device="cpu")) for _ in self.names]

    def merge(self, other: Diagonal) -> None:
        if other._sums:
            pairs = zip(self._sums or self._nothing(), other._sums, strict=True)
            self._sums = [mine.plus(theirs) for mine, theirs in pairs]

    def scaled(self, factor: float) -> dict[str, Tensor]:
        """Parameter name -> the sum times a factor, in the parameter's shape or by channels.

        Zeros for parameters that no pass has reached have the dtype and the device of the first parameter that was reached.
        """
        totals = self.totals
        like = next((total for total in totals if total.dim()), None)
        return {
            name: _like(factor * total, like).expand(self._shape(name, shape)).contiguous()
            for name, total, shape in zip(self.names, totals, self.shapes, strict=True)
            if is_kept(self._layout, name)
        }

    def _shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        channels = sums_in(self._layout, name)
        return shape if channels is None else (channels.length(shape),)

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"squares": [one.recent.clone() for one in self._sums]}
        if any(one.settled is not None for one in self._sums):
            state["settled"] = [_zero() if one.settled is None else one.settled.clone() for one in self._sums]
        return state

    def load(self, state: Mapping[str, Any]) -> None:
        recent, settled = state["squares"], state.get("settled")  # a state of few passes has nothing settled
        before = [None if settled is None else value.clone() for value in settled or recent]
        # A state does not tell how many passes are recent, so that they count as the most that there may be.
        self._sums = [_Sum(r.clone(), PASSES_IN_SINGLE, s) for r, s in zip(recent, before, strict=True)]


def _like(total: Tensor, other: Tensor | None) -> Tensor:
    """A total; if it is a single zero, it takes the other's dtype and device."""
    is_nothing = other is not None and not total.dim() and not bool(total)
    return total.to(other) if is_nothing and other is not None else total


def _zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64, device="cpu")


def _both(before: Tensor | None, value: Tensor) -> Tensor:
    return value if before is None else before + value
