"""The warning of a loss that a monitor has seen to compare every output with every target.

A few losses are meant to do so, such as one of as many quantiles as there are samples. That is why a monitor, which doesn't know
the targets, warns and doesn't refuse.
"""

from __future__ import annotations

from torch_secorder.errors import BroadcastLossWarning, warn_at_users_line


def warn_of_broadcast(n: int, name: str) -> None:
    """Warn of a node of this name, which makes ``[n, n]`` of outputs ``[n, 1]``."""
    warn_at_users_line(
        f"the loss makes a tensor of shape {(n, n)} of the outputs of shape {(n, 1)} ({name}), so that every output is compared "
        f"with every target. Targets or weights of shape {(n,)} broadcast so: pass targets.unsqueeze(-1), or "
        "outputs.squeeze(-1). If the loss is meant to do so, nothing is wrong",
        BroadcastLossWarning,
    )
