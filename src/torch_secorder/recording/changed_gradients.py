"""Whether what a hook of the user's changes is the gradient of a parameter, or that of a layer's input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from torch_secorder.autograd.contributions import NODES_OF_A_LAYER
from torch_secorder.capture.records import Record
from torch_secorder.graph.frontier import ParameterUse


def changes_parameters(node: Any, seen: Record | ParameterUse, changed: list[int], leaves: Sequence[Tensor]) -> bool:
    """Whether the gradients of a layer's or a use's parameters come out of changed ones.

    Args:
        node: the node whose hooks have changed what it returns.
        seen: what is taken apart by samples at this node.
        changed: the numbers of the inputs whose gradients were changed.
        leaves: the analyzed parameters, as the graph has them.
    """
    if isinstance(seen, ParameterUse):
        return any(value.index in changed for value in seen.values)
    trained = [leaves[position] for position in seen.site.positions if leaves[position].requires_grad]
    ends = {get_gradient_edge(leaf).node for leaf in trained}
    ways = [_near(child) & ends for child, _ in node.next_functions]
    # Where some parameter is behind more nodes than that, any input may lead to it.
    return set().union(*ways) != ends or any(ways[nr] for nr in changed)


def _near(start: Node | None) -> set[Node]:
    """A node and those that it leads to within the operation of one layer."""
    queue, near = [start], set[Node]()
    while queue and len(near) < NODES_OF_A_LAYER:
        if (node := queue.pop(0)) is not None and node not in near:
            near.add(node)
            queue += [child for child, _ in node.next_functions]
    return near
