"""Opaque nodes, which a look through a graph must not call: they would run the user's code, or change what they keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from torch_secorder.autograd.guard import RunsOthersCodeError, guarded
from torch_secorder.autograd.kept_values import hides_state, vjp_in_look
from torch_secorder.autograd.nodes import (
    has_others_hooks,
    has_packed_tensors,
    is_others_function,
    is_python_function,
    output_count,
)
from torch_secorder.autograd.random_state import forked_random
from torch_secorder.autograd.sharded import passes_on

Gradients = Sequence[Tensor | None]

# The classes of Python functions that were found to run the user's code in their backward.
_opaque_functions: set[Any] = set()
_tried_functions: set[Any] = set()


def is_opaque(node: Any) -> bool:
    """Whether the node of a Python function is known to be opaque before it is called."""
    # A re-entrant checkpoint doesn't compute the gradients that it is asked for, and accumulates those of the parameters.
    return node.name() == "CheckpointFunctionBackward" or node._forward_cls in _opaque_functions or hides_state(node)


class FoundOpaqueError(Exception):
    """A node turned out to be opaque."""

    def __init__(self, node: Node):
        super().__init__(node.name())
        self.node = node


def called_or_opaque(node: Any, grads: Gradients) -> list[Tensor | None]:
    """The gradients of a node's inputs, in a look.

    Raises:
        FoundOpaqueError: if the node turns out to be opaque.
    """
    if has_others_hooks(node):
        raise FoundOpaqueError(node)
    try:
        return list(grads) if passes_on(node) else vjp_in_look(node, grads)
    except RunsOthersCodeError as error:
        if is_python_function(node) and not has_packed_tensors(node):
            _opaque_functions.add(node._forward_cls)
        raise FoundOpaqueError(node) from error


def runs_others_code(node: Any) -> bool:
    """Whether a node is that of a function that calls modules or starts a backward pass in its backward.

    Each function is tried once. A function that keeps a module or something else to call is not tried, since that might change
    what it keeps, but taken for such a function. Where hooks keep what it has saved, the code that runs may be that of a
    checkpoint, which calls its modules again to give the saved tensors back, and says nothing of the function.
    """
    if not is_others_function(node):
        return False
    kind = node._forward_cls
    if hides_state(node):
        return kind in _opaque_functions or any(callable(value) for value in vars(node).values())
    if kind not in _tried_functions and not has_packed_tensors(node):
        _tried_functions.add(kind)
        try:
            with guarded(), forked_random(), torch.no_grad():
                vjp_in_look(node, [None] * output_count(node))
        except RunsOthersCodeError:
            _opaque_functions.add(kind)
        except Exception:  # It raises the same when it is called in earnest.
            return False
    return kind in _opaque_functions
