"""Where the graph of a gradient begins, which a backward pass with ``create_graph=True`` makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from torch_secorder.autograd.engine import is_executed
from torch_secorder.autograd.node_hooks import NodeHook


class GradientGraphWatch:
    """Has the nodes that one backward pass with ``create_graph=True`` makes call back when another pass goes through them.

    Args:
        on_gradient: called with the gradients of such a node's outputs, in the later pass. The nodes keep it.
    """

    def __init__(self, on_gradient: Callable[..., None]):
        self._on_gradient = on_gradient
        self._seen: set[Node] = set()
        self._handles: list[Any] = []

    def watch_below(self, node: Node | None) -> None:
        """Watch what the pass under way makes at this node and at all nodes that it leads to."""
        stack = [] if node is None or node in self._seen else [node]
        while stack:
            current = stack.pop()
            if current in self._seen:
                continue
            self._seen.add(current)
            inner = [child for child, _ in current.next_functions if child is not None]
            if inner and is_executed(current):
                self._handles.append(current.register_hook(NodeHook(_hook_makers, self._on_gradient)))
                stack += inner

    def close(self) -> None:
        """The pass is over: leave the graph that it went through."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._seen = [], set()


def _hook_makers(on_gradient: Callable[..., None], made: Sequence[Tensor | None], _: object) -> None:
    """Hook the nodes that made the results of a node, which has just run in the pass."""
    for node in {grad.grad_fn for grad in made if grad is not None and grad.grad_fn is not None}:
        node.register_prehook(on_gradient)
