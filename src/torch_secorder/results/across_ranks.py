"""Statistics of several ranks: what each rank has accumulated, and the sums of several statistics."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from torch_secorder.errors import LifecycleError
from torch_secorder.results.statistics import Statistics


def sum_of(like: Statistics, *parts: Statistics) -> Statistics:
    """New statistics of the same kind as ``like``, with the samples of all parts; no part changes."""
    whole = Statistics(like.names, like.shapes, **like.keeps)
    for part in parts:
        whole.merge(part)
    return whole


def of_all_ranks(own: Statistics, group: Any) -> list[Statistics]:
    """The statistics of each rank of a process group, in the order of the ranks; all ranks have to call this.

    Raises:
        LifecycleError: if no process group was initialized.
        ArgumentError: if the ranks analyze different parameters, or keep different things.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise LifecycleError("no process group: call torch.distributed.init_process_group first, or run under torchrun")
    states: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(states, own.state_dict(), group)
    found = [sum_of(own) for _ in states]
    for one, state in zip(found, states, strict=True):
        one.load_state_dict(state)
    return found
