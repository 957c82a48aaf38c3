"""The nodes that accumulate the gradients of leaves, asked for and kept so that no two threads wait for each other.

Whoever asks torch for such a node waits for a lock of the leaf's. Since torch 2.13, an operation that has this lock waits for
Python's where Python alone keeps the node alive. A thread that has Python's, as in the call of a Python function, and asks for
the node then waits for ever. So the library does not have Python's lock when it asks, and a node that it keeps is kept by
another node of torch's as well, since the program's own functions would wait, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from torch_secorder.autograd.compiled import never_compiled


class LeafNodes(dict[Node, int]):
    """The nodes that accumulate the gradients of leaves, all of which require one -> the leaves' positions.

    Args:
        leaves: the leaves by their positions.
    """

    def __init__(self, leaves: Mapping[int, Tensor]):
        nodes, self._owner = accumulators(list(leaves.values()))
        super().__init__(zip(nodes, leaves, strict=True))

    def take(self, others: LeafNodes) -> None:
        """Put other nodes in the place of these."""
        self.clear()
        self.update(others)
        self._owner = others._owner


@never_compiled
def accumulators(leaves: Sequence[Tensor]) -> tuple[list[Node], object]:
    """The nodes that accumulate the gradients of these leaves, all of which require one, and what keeps the nodes for torch."""
    if not leaves:
        return [], None
    with torch.enable_grad():  # Every block asks for those of all parameters, so that one function takes them all.
        if {type(x).__torch_dispatch__ for x in leaves} != {Tensor.__torch_dispatch__}:
            # Only a Python function takes such leaves without an operation that their classes see, and Python's lock with them.
            output: Any = _TakesAll.apply(*leaves)  # type: ignore[no-untyped-call]  # torch does not type it.
            # With torch 2.8 a function's node is only there as long as its output is.
            return _children(output.grad_fn), output
        with torch._C._DisableTorchDispatch():  # Modes of the user's would see a copy of each leaf.
            function: Any = torch._C._functions.DelayedError("no gradient is ever asked for", len(leaves))
            outputs = function(*leaves)
        node: Any = (outputs if len(leaves) == 1 else outputs[0]).grad_fn
    return _children(node), node


def _children(node: Any) -> list[Node]:
    return [child for child, _ in node.next_functions]


class _TakesAll(torch.autograd.Function):
    """A function of any number of tensors, whose node leads to the nodes of all of them."""

    @staticmethod
    def forward(ctx: Any, *leaves: Tensor) -> Tensor:
        return torch.empty(0, device="cpu")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("no gradient is ever asked for")
