"""A pretend accelerator, for machines that have none: tensors on device "pretend" keep their numbers in the CPU's memory.

What a GPU would not forgive is not forgiven here: operations that mix devices raise, a copy that was not awaited holds
nonsense, and float64 is refused on request. What a GPU is slow at is counted: launches, waits of the host with the line that
caused them, and bytes. Backward passes run in a thread of the device.

It can't show everything. There are no streams and no events; all devices share one thread for backward passes, and no
generator lives on one. Nodes that only a real GPU has (fused attention, cuDNN's normalization and recurrence) are the CPU's
here; sparse and nested tensors do not run, and what asks for the exact type of a tensor does not find torch's own. To torch's
C++ code all devices are the first one, so that an index may come from any of them. An operation counts as one launch, whatever
kernels a GPU makes of it, but for foreach calls and concatenations; what an operation takes for itself is in no count of bytes.
A copy to the device is taken at once, so that it forgives if its source is written to.
"""

from pretend.counting import Counts, counting
from pretend.device import register
from pretend.memory import live_bytes, peak_bytes
from pretend.tensor import Pretend, moved, without_float64

__all__ = ["Counts", "Pretend", "counting", "live_bytes", "moved", "peak_bytes", "register", "without_float64"]
