"""Warnings of losses in a monitor's block that are probably not what their user means.

A monitor sees the graph of a loss, but not its function and targets, so it warns where functions and reports find out or refuse.
"""

from __future__ import annotations

from torch_secorder.errors import BroadcastLossWarning, ReductionWarning, warn_at_users_line


def warn_of_broadcast(name: str, shape: tuple[int, ...]) -> None:
    """Warn that a node of this name makes ``[n, n]`` of n outputs of this shape, as a few losses of quantiles are meant to."""
    n = shape[0]
    targets, fits = ((n, 1), "targets.squeeze(-1)") if len(shape) == 1 else ((n,), "targets.unsqueeze(-1)")
    warn_at_users_line(
        f"the loss broadcasts the outputs of shape {shape} to {(n, n)} (in {name}), so that every output is compared with every "
        f"target. Targets or weights of shape {targets} cause that: pass {fits}. Ignore this if the loss is meant to do it",
        BroadcastLossWarning,
    )


def warn_of_reduction(found: str, told: str, n: int) -> None:
    """Warn that the loss of n samples sums and the monitor was told that it averages, or the other way round."""
    does, wrong = ("sums", f"{n * n:,} times too large") if found == "sum" else ("averages", "too small")
    warn_at_users_line(
        f'the loss {does} over its {n} samples, but the monitor has reduction="{told}", which makes its traces {wrong}: pass '
        f'reduction="{found}" to FisherMonitor, or reduction="{told}" to the loss',
        ReductionWarning,
    )
