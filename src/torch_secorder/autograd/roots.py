"""Where the backward passes that are under way began: at losses, which no gradient that arrives further down shows."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import FrameType

from torch import Tensor, autograd
from torch.autograd.graph import GradientEdge, Node

from torch_secorder.autograd.nodes import made_by

# The functions of torch in which a user's program waits for a backward pass, and their argument that says where it begins.
_BEGINS_AT = {autograd.backward.__code__: "tensors", autograd.grad.__code__: "outputs"}


def roots_under_way() -> list[Node]:
    """The nodes at which the backward passes under way began, those of all threads.

    Hooks run below the call of torch.autograd that began their pass, or in a thread of their device while that call waits. A pass
    that was begun in another way is not seen.
    """
    return [node for frame in sys._current_frames().values() for node in _begun_in(frame)]


def _begun_in(frame: FrameType | None) -> Iterator[Node]:
    while frame is not None:
        if (argument := _BEGINS_AT.get(frame.f_code)) is not None:
            yield from _nodes(frame.f_locals[argument])
        frame = frame.f_back


def _nodes(roots: object) -> Iterator[Node]:
    # Both are tuples, but an edge is one root.
    several = not isinstance(roots, (Tensor, GradientEdge)) and isinstance(roots, Iterable)
    for root in roots if several else (roots,):  # type: ignore[attr-defined]  # "several" says that it is iterable.
        if isinstance(root, GradientEdge):
            yield root.node
        elif isinstance(root, Tensor) and root.requires_grad:
            yield made_by(root)
