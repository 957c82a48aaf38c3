"""What a loss does to a model's outputs ``[n, 1]`` or ``[n]`` before anything else: whether it makes ``[n, n]`` of them.

From outputs of one of these shapes and targets of the other, a difference or a product is ``[n, n]``: every output meets every
target. A backward pass that reaches the outputs has come from the loss, so that the nodes between the two show it.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.autograd.graph import Node

from torch_secorder.autograd.nodes import output_shapes
from torch_secorder.autograd.roots import roots_of_pass


def broadcast_in_pass(outputs: Node, n: int) -> tuple[str, tuple[int, ...]] | None:
    """The node in the backward pass under way that broadcasts outputs of n numbers to ``[n, n]``, together with a constant.

    Args:
        outputs: the node that made the outputs.
        n: how many samples there are.

    Returns:
        The node's name, and the shape of what it broadcasts; None if there is no such node, or none is seen.
    """
    if n < 2:
        return None
    found = ((node.name(), _broadcast_by(node, outputs, n)) for node in _above(outputs))
    return next(((name, shape) for name, shape in found if shape is not None), None)


def _above(outputs: Node) -> Iterator[Node]:
    """The nodes of the pass under way, without what is below the outputs."""
    seen, waiting = {outputs}, roots_of_pass()
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            waiting += [child for child, _ in node.next_functions if child is not None]


def _broadcast_by(node: Node, outputs: Node, n: int) -> tuple[int, ...] | None:
    """The shape of what a node makes ``[n, n]`` of, if that is the outputs, or was made of nothing but them."""
    child = _only_child(node) if output_shapes([node]) == ((n, n),) else None
    if child is None:
        return None
    (shape,) = output_shapes([child])
    while child is not None and output_shapes([child]) in (((n, 1),), ((n,),)):
        if child is outputs:
            return shape
        child = _only_child(child)
    return None


def _only_child(node: Node) -> Node | None:
    """What the node's only input that needs a gradient was made by."""
    children = [child for child, _ in node.next_functions if child is not None]
    return children[0] if len(children) == 1 else None
