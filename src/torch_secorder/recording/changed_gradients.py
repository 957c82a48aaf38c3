"""Whether the user's hooks on nodes change the gradient of a parameter, or only that of a layer's input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from torch_secorder.autograd.contributions import NODES_OF_A_LAYER
from torch_secorder.autograd.engine import current_node
from torch_secorder.autograd.node_hooks import HookTable, NodeHook, ReturnsWatch, has_others
from torch_secorder.capture.records import Record
from torch_secorder.graph.uses import ParameterUse
from torch_secorder.recording.backward_pass import BackwardPass, changed_by_hook


class ChangedGradients:
    """Refuses passes in which the user's hooks change a parameter's gradient after the node that computes it.

    Args:
        leaves: the analyzed parameters, as the graph has them.
        owner: the object whose hooks on nodes take gradients apart by samples.
        described: names what has a gradient, for messages.
    """

    def __init__(
        self, leaves: Sequence[Tensor], owner: object, described: Callable[[Record | ParameterUse | None], str]
    ):
        self._leaves, self._owner, self._described = leaves, owner, described

    def watch(self, current: BackwardPass, table: HookTable) -> None:
        """Watch whether the user's hooks in this table change what their node is about to return."""
        if has_others(table):
            ReturnsWatch(table, partial(self._on_change, current, self._seen_at(table)))

    def _seen_at(self, table: HookTable) -> list[Record | ParameterUse]:
        """What the owner takes apart by samples at a node, by the hooks that run after it."""
        hooks = [hook for hook in table.values() if isinstance(hook, NodeHook)]
        return [hook.args[0] for hook in hooks if getattr(hook.func, "__self__", None) is self._owner]

    def _on_change(self, current: BackwardPass, seen: list[Record | ParameterUse], changed: list[int]) -> None:
        """Hooks of the user's have changed what a node returned for some of its inputs."""
        for one in seen:
            if current.error is None and _changes_parameters(current_node(), one, changed, self._leaves):
                current.error = changed_by_hook(self._described(one))

    def require_watched(self, current: BackwardPass, seen: Record | ParameterUse, table: HookTable) -> None:
        """Refuse a pass if the user put hooks on a node too late for them to be watched."""
        if current.error is None and has_others(table) and not ReturnsWatch.encloses(table):
            current.error = changed_by_hook(self._described(seen))


def _changes_parameters(node: Any, seen: Record | ParameterUse, changed: list[int], leaves: Sequence[Tensor]) -> bool:
    """Whether the parameters of a layer or of a use get their gradients from changed ones.

    Args:
        node: the node whose hooks have changed what it returns.
        seen: what is taken apart by samples at this node.
        changed: the numbers of the inputs whose gradients were changed.
        leaves: the analyzed parameters, as the graph has them.
    """
    if isinstance(seen, ParameterUse):
        return any(value.input_index in changed for value in seen.values)
    trained = [leaves[position] for position in seen.site.positions if leaves[position].requires_grad]
    ends = {get_gradient_edge(leaf).node for leaf in trained}
    ways = [_near(child) & ends for child, _ in node.next_functions]
    # A parameter that is further away than this may be reached from any input.
    return set().union(*ways) != ends or any(ways[nr] for nr in changed)


def _near(start: Node | None) -> set[Node]:
    """A node and the nodes that it leads to within the operation of one layer."""
    queue, near = [start], set[Node]()
    while queue and len(near) < NODES_OF_A_LAYER:
        if (node := queue.pop(0)) is not None and node not in near:
            near.add(node)
            queue += [child for child, _ in node.next_functions]
    return near
