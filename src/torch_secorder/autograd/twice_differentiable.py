"""What the library's own runs of a model do differently where second derivatives are wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_secorder.autograd.checkpoints import without_checkpoints


@contextmanager
def twice_differentiable(wanted: bool) -> Iterator[None]:
    """A block in which models have second derivatives, if those are wanted.

    Torch's fused attention has none, and a checkpoint would have to run its forward again when the block is over.
    """
    if not wanted:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH), without_checkpoints():
        yield
