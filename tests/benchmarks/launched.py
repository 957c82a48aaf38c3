"""What one step launches, waits for and takes of memory: as a pretend device counts, or as torch's profiler sees on a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch.profiler import ProfilerActivity, profile

import pretend
from benchmarks.workloads import Setting

# The profiler itself waits for the whole device once.
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "hipStreamSynchronize", "hipEventSynchronize")


@dataclass(frozen=True)
class Counted:
    """The counts of one step.

    Attributes:
        launches: how many kernels it launched.
        waits: how often the host waited.
        peak: the bytes that it took at most, above what was there before.
        places: the lines that made the host wait, and how often; on the pretend device only, as the next.
        operations: how many kernels each operation launched.
    """

    launches: int
    waits: int
    peak: int
    places: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)

    def row(self) -> dict[str, int]:
        """The numbers of a table."""
        return {"launches": self.launches, "waits": self.waits, "peak": self.peak}


def device_named(text: str) -> torch.device:
    """The device of that name; torch is told of the pretend one."""
    if text == "pretend":
        pretend.register()
    return torch.device(text)


def moved(setting: Setting, device: torch.device) -> Setting:
    """The model and its batch on the device."""
    if device.type != "pretend":
        return replace(
            setting,
            model=setting.model.to(device),
            inputs=setting.inputs.to(device),
            targets=setting.targets.to(device),
        )
    return replace(setting, **{part: pretend.moved(getattr(setting, part)) for part in ("model", "inputs", "targets")})


def counted(step: Callable[[], object], device: torch.device) -> Counted:
    """The counts of one call."""
    if device.type == "pretend":
        with pretend.counting() as counts:
            step()
        return Counted(counts.launches.total(), counts.waits.total(), counts.peak, counts.places, counts.launches)
    torch.accelerator.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
    calls = {event.key: event.count for event in seen.key_averages()}
    launched = sum(count for name, count in calls.items() if "LaunchKernel" in name)
    waited = sum(calls.get(name, 0) for name in WAITS)
    return Counted(launched, waited, torch.cuda.max_memory_allocated(device) - before)
