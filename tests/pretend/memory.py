"""How many bytes are in use on each device, and how many there were at most."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

_lock = threading.RLock()  # of a kind that may be taken again, since tensors die anywhere
_tensors: defaultdict[int, int] = defaultdict(int)  # address of the memory -> how many tensors have it
_live: defaultdict[int, int] = defaultdict(int)  # device -> bytes
_peak: defaultdict[int, int] = defaultdict(int)
# Id of a reference -> the reference, whose callback runs as long as it is kept, with the address, the bytes and the device.
_references: dict[int, tuple[weakref.ref[Tensor], int, int, int]] = {}


def live_bytes(device: int = 0) -> int:
    """The bytes that tensors on a device hold now, each piece of memory once."""
    return _live[device]


def peak_bytes(device: int = 0) -> int:
    """The most bytes that were held at once, since the innermost block of :func:`peak_of` began."""
    return _peak[device]


def held(numbers: Tensor, device: int) -> None:
    """Tell that a tensor on a device has its numbers there, as long as ``numbers`` lives."""
    storage = numbers.untyped_storage()
    address, size = storage.data_ptr(), storage.nbytes()
    if not size:
        return
    with _lock:
        _tensors[address] += 1
        if _tensors[address] == 1:
            _live[device] += size
            _peak[device] = max(_peak[device], _live[device])
    # weakref.finalize does the same at twice the cost, and each operation makes a tensor.
    reference = weakref.ref(numbers, _released)
    _references[id(reference)] = reference, address, size, device


def _released(reference: weakref.ref[Tensor]) -> None:
    _, address, size, device = _references.pop(id(reference))
    with _lock:
        _tensors[address] -= 1
        if not _tensors[address]:
            del _tensors[address]
            _live[device] -= size


@contextmanager
def peak_of() -> Iterator[Callable[[], int]]:
    """A function that returns the most bytes of a block over those at its beginning, on the device where they are the most."""
    with _lock:
        before, outer = dict(_live), dict(_peak)
        _peak.update(_live)
    try:
        yield lambda: max((peak - before.get(device, 0) for device, peak in _peak.items()), default=0)
    finally:
        with _lock:
            for device, peak in outer.items():
                _peak[device] = max(peak, _peak[device])
