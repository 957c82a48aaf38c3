"""Half precision and autocast: what they are, and a block without them."""

from __future__ import annotations

from contextlib import ExitStack

import torch


def is_autocast() -> bool:
    """Whether operations may be done in half precision."""
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def full_precision() -> ExitStack:
    """A block without autocast, which a backward pass inside an autocast block would otherwise put on our sums."""
    stack = ExitStack()
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    return stack
