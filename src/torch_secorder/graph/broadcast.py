"""What a loss does to a model's outputs ``[n, 1]`` before anything else: whether it makes ``[n, n]`` of them.

From outputs ``[n, 1]`` and targets ``[n]``, a difference or a product is ``[n, n]``: every output meets every target. A backward
pass that reaches the outputs has come from the loss, so that the nodes between the two show it.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.autograd.graph import Node

from torch_secorder.autograd.nodes import output_shapes
from torch_secorder.autograd.roots import roots_of_pass


def broadcasting_node(outputs: Node, n: int) -> Node | None:
    """The node in the backward pass under way that broadcasts outputs ``[n, 1]`` to ``[n, n]``, together with a constant.

    Args:
        outputs: the node that made the outputs.
        n: how many samples there are.

    Returns:
        None if there is no such node, or none is seen.
    """
    if n < 2:
        return None
    return next((node for node in _above(outputs) if _broadcasts(node, outputs, n)), None)


def _above(outputs: Node) -> Iterator[Node]:
    """The nodes of the pass under way, without what is below the outputs."""
    seen, waiting = {outputs}, roots_of_pass()
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            waiting += [child for child, _ in node.next_functions if child is not None]


def _broadcasts(node: Node, outputs: Node, n: int) -> bool:
    if output_shapes([node]) != ((n, n),):
        return False
    while (child := _only_child(node)) is not None:
        if child is outputs:
            return True
        if output_shapes([child]) != ((n, 1),):
            return False
        node = child
    return False


def _only_child(node: Node) -> Node | None:
    """What the node's only input that needs a gradient was made by."""
    children = [child for child, _ in node.next_functions if child is not None]
    return children[0] if len(children) == 1 else None
