"""How many bytes of tensors are alive at once, as torch's allocator counts them: the same in every run."""

from __future__ import annotations

import os
from itertools import accumulate

from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # The profiler says on the terminal when it begins and ends.


class LiveBytes:
    """``with LiveBytes() as live:`` tells in ``live.peak`` by how much the bytes of all tensors on the CPU grew inside, at most.

    The process grows by more: holes between small blocks that stay take about as much again, and more or less of it from one
    run to the next.
    """

    def __enter__(self) -> LiveBytes:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._profile.__exit__(*exc_info)  # type: ignore[arg-type]
        results = self._profile.profiler.kineto_results  # type: ignore[union-attr]
        events = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
        self.changes = [nbytes for _, nbytes in events]
        self.peak = max(accumulate(self.changes), default=0)
