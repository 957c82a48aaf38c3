"""Whether the gradient that arrives at a leaf is what one node made of it, with nothing added and nothing changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from torch_secorder.autograd.node_hooks import NodeHook
from torch_secorder.autograd.versions import version

# How many nodes a layer's own operation has at most between its output and its weight: views, the product, a transposition.
NODES_OF_A_LAYER = 8

Identity = tuple[int, int]


def identity(grad: Tensor) -> Identity:
    """Where a gradient's numbers are, and how often they were changed in place.

    Autograd adds a second contribution to a leaf either in place, which counts as a change, or into memory of its own, while the
    first one still has its place. So a gradient that arrives with the identity of a contribution is that contribution alone.
    """
    return grad.data_ptr(), version(grad)


def note_contribution(node: Node | None, leaf: Tensor, note: Callable[[Identity], None]) -> bool:
    """Have ``note`` called with the identity of what a layer contributes to a leaf's gradient, once that is computed.

    Args:
        node: the node of the layer's output, before it runs.
        leaf: one of the layer's parameters.
        note: called inside the backward pass.

    Returns:
        Whether the node that computes the contribution was found.
    """
    end, queue, seen = get_gradient_edge(leaf).node, [node], 0
    while queue and seen < NODES_OF_A_LAYER:
        current, seen = queue.pop(0), seen + 1
        if current is None:
            continue
        children = [child for child, _ in current.next_functions]
        if end in children:
            handles: list[Any] = []
            handles.append(current.register_hook(NodeHook(_note_once, note, children.index(end), handles)))
            return True
        queue += children
    return False


def _note_once(
    note: Callable[[Identity], None], index: int, handles: list[Any], made: Sequence[Tensor | None], _: object
) -> None:
    while handles:
        handles.pop().remove()
    if (grad := made[index]) is not None:
        note(identity(grad))
