"""Copies to the host that were not awaited yet."""

from __future__ import annotations

import threading
from collections import deque

import torch
from torch import Tensor

_under_way: deque[tuple[Tensor, Tensor]] = deque()
_lock = threading.Lock()


def start(target: Tensor, source: Tensor) -> None:
    """A copy that does not block: until the host waits, the target holds what nobody wants to read."""
    landing = target.data  # whose versions are counted apart from the target's
    with _lock:
        _under_way.append((landing, source.clone()))
    landing.copy_(source)
    _poison(landing)


def deliver() -> None:
    """All copies have arrived."""
    with _lock:
        while _under_way:
            target, source = _under_way.popleft()
            target.copy_(source)


def _poison(target: Tensor) -> None:
    """Fill with NaN, with the lowest of the integers, or with the opposite of what is there."""
    if target.dtype == torch.bool:
        target.logical_not_()
    elif target.dtype.is_floating_point or target.is_complex():
        target.fill_(torch.nan)
    else:
        target.fill_(torch.iinfo(target.dtype).min)
