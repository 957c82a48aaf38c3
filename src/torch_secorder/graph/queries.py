"""Questions to a graph that need no walk through it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from torch_secorder.model.containers import tensors
from torch_secorder.model.parameters import ParameterTable

# Nodes that can be differentiated once only, by the beginning of their names, and what makes torch use others in their place.
_UNDER = "compute it under {}, by operations that have one"
_PLAIN_RNN = _UNDER.format("torch.backends.cudnn.flags(enabled=False)")
ONCE = {
    "ScaledDotProduct": _UNDER.format("torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"),
    "CudnnRnn": _PLAIN_RNN,
    "MiopenRnn": _PLAIN_RNN,
    "EmbeddingBag": "compute it as torch.nn.functional.embedding(ids, weight).sum(1), or .mean(1) or .amax(1)",
    "Cdist": "compute it as torch.linalg.vector_norm(a.unsqueeze(-2) - b.unsqueeze(-3), dim=-1)",
    "CtcLoss": "leave out create_graph, since torch has no other",
}


def without_second_derivative(outputs: Any, table: ParameterTable) -> tuple[str, str] | None:
    """In words, a node that can't be differentiated twice with the parameter nearest to it, and the remedy.

    It is None if there is no such node.
    """
    for node in _before([x.grad_fn for x in tensors(outputs)]):
        remedy = next((remedy for name, remedy in ONCE.items() if node.name().startswith(name)), None)
        if remedy is None or "Math" in node.name():
            continue
        positions = (table.position(getattr(one, "variable", None)) for one in _before([node]))
        nearest = next((f" at {table.names[position]}" for position in positions if position is not None), "")
        return f"{node.name()}{nearest}", remedy
    return None


def _before(nodes: Sequence[Node | None]) -> Iterator[Node]:
    """These nodes and all that they were computed from, level by level."""
    level = list(dict.fromkeys(node for node in nodes if node is not None))
    seen = set(level)
    while level:
        yield from level
        level = list(
            dict.fromkeys(c for node in level for c, _ in node.next_functions if c is not None and c not in seen)
        )
        seen.update(level)


class LossGraph:
    """The graph between a loss and the model's outputs, and whatever the loss uses beside them.

    Attributes:
        kind: a hash of the nodes' names in order, and of which outputs they lead to. A function may compute one loss today and
            another one tomorrow.
    """

    def __init__(self, loss: Tensor, outputs: Any):
        stop = {x.grad_fn: index for index, x in enumerate(tensors(outputs)) if x.grad_fn is not None}
        self._nodes: list[Node] = []
        met: list[object] = []
        stack: list[Node | None] = [loss.grad_fn]
        seen = set(stack)
        while stack:
            if (node := stack.pop()) is None:
                continue
            if node in stop:
                met.append(stop[node])
                continue
            met.append(node.name())
            self._nodes.append(node)
            for child, _ in node.next_functions:
                if child not in seen:
                    seen.add(child)
                    stack.append(child)
        self.kind = hash(tuple(met))

    def parameters(self, table: ParameterTable) -> list[str]:
        """The names of the parameters that it leads to by another way than through the outputs, as a weight penalty does."""
        positions = (table.position(getattr(node, "variable", None)) for node in self._nodes)
        return list(dict.fromkeys(table.names[position] for position in positions if position is not None))
