"""Hooks on nodes: where they see a tensor's gradient, and whether those of the user's change what a node returns.

torch keeps all hooks that run after a node in one table, in the order in which they run. It shows the table to whoever
registers a hook.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.hooks import RemovableHandle

from torch_secorder.autograd.engine import without_modes
from torch_secorder.autograd.hooks import gradient_hooks
from torch_secorder.model.hooks import WeakHook

HookTable = dict[int, Callable[..., Any]]
TableReference = Callable[[], HookTable | None]
Returned = Sequence[Tensor | None]

# When a backward pass frees the graph, these nodes write over what they saved, and can't be called again. A call before that
# works on a copy.
OVERWRITING = ("CudnnRnnBackward0", "MiopenRnnBackward0")


def no_table() -> None:
    """The reference to a table that is not there, for records without a node."""


class NodeHook(partial[None]):
    """A hook of the library's that is called when a node has run, with what it returned and the gradients that it was given."""


def gradient_edge_of(output: Tensor) -> GradientEdge | None:
    """Where in the graph the gradient of ``output`` arrives, whatever is done to ``output`` later; None for a leaf.

    An in-place operation on a view replaces the view's node, so the node of its base is taken, which sees the same
    numbers in the base's shape. What a function returns, a re-entrant checkpoint for one, may be a view of something that was
    computed without a graph; torch allows no in-place operation on such a view.
    """
    whole = output
    if output._is_view() and output._base is not None and output._base.requires_grad:
        base = output._base
        whole = base if base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous() else output
    return None if whole.grad_fn is None else GradientEdge(whole.grad_fn, whole.output_nr)


def call_after(node: Node, function: Callable[..., None], *args: Any) -> TableReference:
    """Have ``function(*args, returned, grads)`` called when a node has run.

    Returns:
        A weak reference to the table of the hooks that run after this node. (The table is the node's, and the hook in it often
        holds what asks for the table: together they would outlive the graph.)
    """
    handle: RemovableHandle = node.register_hook(NodeHook(function, *args))
    found: weakref.ref[HookTable] = handle.hooks_dict_ref
    return found


def call_with_gradients(node: Node, function: Callable[..., None], *args: Any) -> TableReference:
    """Have ``function(*args, returned, grads)`` called when a node has run, while what it saved is still as it was.

    Nodes that write over what they saved are about to run then, and have returned nothing.

    Returns:
        A weak reference to the table of the hooks that run after this node.
    """
    if node.name() not in OVERWRITING:
        return call_after(node, function, *args)
    node.register_prehook(partial(function, *args, ()))
    return call_after(node, _hold_the_place)


def _hold_the_place(returned: Returned, grads: Returned) -> None:
    """Do nothing. The hook takes the place in the table at which the library's hook would stand."""


def has_others_hooks_on_gradient(x: Tensor) -> bool:
    """Whether hooks of the user's on a tensor, or on the node that made it, may change its gradient or see it."""
    on_tensor = (gradient_hooks(x) or {}).values()
    on_node = x.grad_fn is not None and has_others_hooks_on_node(x.grad_fn)
    return on_node or not all(isinstance(hook, WeakHook) for hook in on_tensor)


def has_others_hooks_on_node(node: Node) -> bool:
    """Whether hooks of the user's run before or after a node."""
    return has_others(hooks_before(node)) or has_others(_hooks_after(node))


def _hooks_after(node: Node) -> HookTable:
    """The table of the hooks that run after a node, and stay with it."""
    return _table_of(node.register_hook(lambda returned, grads: None))


def hooks_before(node: Node) -> HookTable:
    """The table of the hooks that run before a node, and stay with it."""
    return _table_of(node.register_prehook(lambda grads: None))


def _table_of(handle: RemovableHandle) -> HookTable:
    """The table of a hook, which is removed from it."""
    table: HookTable | None = handle.hooks_dict_ref()
    assert table is not None  # The node keeps the table.
    del table[handle.id]
    return table


def has_others(table: HookTable) -> bool:
    """Whether hooks of the user's are in a table."""
    return not all(isinstance(hook, NodeHook) for hook in table.values())


class ReturnsWatch:
    """Two hooks around all others of a node, which compare what the node returned with what the others have made of it.

    Args:
        table: the hooks that run after the node.
        on_change: called with the numbers of the inputs whose gradients the others have changed.
    """

    def __init__(self, table: HookTable, on_change: Callable[[list[int]], None]):
        self._before: list[Tensor | None] = []
        self._on_change, others = on_change, dict(table)
        table.clear()  # torch reads the table as a plain dict, in the order of insertion
        self._add(table, self._note)
        table.update(others)
        self._add(table, self._compare)

    @staticmethod
    def _add(table: HookTable, method: Callable[[Returned, object], None]) -> None:
        table[RemovableHandle(table).id] = NodeHook(method)

    @staticmethod
    def encloses(table: HookTable) -> bool:
        """Whether the last hook in a table is that of a watch, so that no other came later."""
        last = list(table.values())[-1]
        return isinstance(last, NodeHook) and isinstance(getattr(last.func, "__self__", None), ReturnsWatch)

    def _note(self, returned: Returned, _: object) -> None:
        with torch.no_grad(), without_modes():  # A hook may write on a tensor in ways that no version tells.
            self._before = [None if x is None else x.clone() for x in returned]

    def _compare(self, returned: Returned, _: object) -> None:
        before, self._before = self._before, []
        with torch.no_grad(), without_modes():
            changed = [nr for nr, (x, y) in enumerate(zip(before, returned, strict=True)) if not _is_same(x, y)]
        if changed:
            self._on_change(changed)


def _is_same(x: Tensor | None, y: Tensor | None) -> bool:
    if x is None or y is None:
        return x is y
    if x.layout != y.layout or x.shape != y.shape:
        return False
    x, y = (one.to_dense() if one.layout != torch.strided else one for one in (x, y))
    return bool(((x == y) | ((x != x) & (y != y))).all())
