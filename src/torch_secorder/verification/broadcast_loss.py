"""The warning that a loss in a monitor's block compares every output with every target.

A few losses are meant to do so, such as one with as many quantiles as there are samples. A monitor does not know the targets, so
it warns instead of refusing.
"""

from __future__ import annotations

from torch_secorder.errors import BroadcastLossWarning, warn_at_users_line


def warn_of_broadcast(n: int, name: str) -> None:
    """Warn that a node of this name makes ``[n, n]`` of outputs ``[n, 1]``."""
    warn_at_users_line(
        f"the loss makes a tensor of shape {(n, n)} of the outputs of shape {(n, 1)} ({name}), so that every output is compared "
        f"with every target. Targets or weights of shape {(n,)} broadcast so: pass targets.unsqueeze(-1), or "
        "outputs.squeeze(-1). If the loss is meant to do so, nothing is wrong",
        BroadcastLossWarning,
    )
