"""What one rank has accumulated, and what all ranks have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from torch_secorder.errors import LifecycleError
from torch_secorder.results.statistics import Statistics


class RankedStatistics:
    """The statistics of this rank, beside those that all ranks have in common after an :meth:`all_reduce`.

    Args:
        own: what this rank has seen since, or at all if there are no other ranks; it is added to in place.

    Attributes:
        counts_samples: whether this rank's samples count when ranks are added up; False if another rank computed the same ones.
    """

    def __init__(self, own: Statistics):
        self.own = own
        self._reduced: Statistics | None = None  # what all ranks have in common, as soon as there is something
        self.counts_samples = True

    @property
    def _common(self) -> Statistics:
        if self._reduced is None:
            self._reduced = _sum_of(self.own)
        return self._reduced

    def whole(self) -> Statistics:
        """The samples that all ranks have in common, and those that this rank saw since."""
        if self._reduced is None or not (self._common.n or self._common.skipped_passes):
            return self.own
        return _sum_of(self.own, self._common, self.own)

    def reduced(self, group: Any = None) -> Statistics:
        """The samples that all ranks have in common, and those that any rank saw since; all ranks have to call this.

        Raises:
            LifecycleError: if no process group was initialized.
            ArgumentError: if the ranks analyze different parameters, or keep different things.
        """
        own = self.own if self.counts_samples else _sum_of(self.own)
        return _sum_of(self.own, self._common, *_of_all_ranks(own, group))

    def all_reduce(self, group: Any = None) -> None:
        """Make the samples of all ranks common to them; see :meth:`reduced`."""
        self._reduced = self.reduced(group)
        self.own.clear()

    def merge(self, samples: Statistics) -> None:
        """Add samples of another run to this rank's.

        Raises:
            ArgumentError: if names, shapes or what is kept differ, or if some of these samples are here already.
        """
        self._common.require_none_of(samples)
        self.own.merge(samples)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all samples by those of a state."""
        self.own.load_state_dict(state)
        self._reduced = None

    def clear(self) -> None:
        """Forget all samples."""
        self.own.clear()
        self._reduced = None


def _sum_of(like: Statistics, *parts: Statistics) -> Statistics:
    """New statistics of the same kind as ``like``, with the samples of all parts; no part changes."""
    whole = Statistics(like.names, like.shapes, **like.keeps)
    for part in parts:
        whole.merge(part)
    return whole


def _of_all_ranks(own: Statistics, group: Any) -> list[Statistics]:
    """The statistics of each rank of a process group, in the order of the ranks; all ranks have to call this."""
    if not (dist.is_available() and dist.is_initialized()):
        raise LifecycleError("no process group: call torch.distributed.init_process_group first, or run under torchrun")
    states: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(states, own.state_dict(), group)
    found = [_sum_of(own) for _ in states]
    for one, state in zip(found, states, strict=True):
        one.load_state_dict(state)
    return found
