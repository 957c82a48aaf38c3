"""The way of gradients from some nodes of a graph down to others, and how they flow along it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from torch_secorder.autograd.kept_values import vjp_in_look
from torch_secorder.autograd.nodes import Edge, fitted, is_python_function, outputs_of
from torch_secorder.autograd.opaque import Gradients, is_opaque
from torch_secorder.errors import CoverageError

Arrive = Callable[[Node, Gradients], None]
Call = Callable[[Node, Gradients], list[Tensor | None]]


class Route:
    """The nodes on the ways from some nodes down to others.

    Args:
        starts: where the ways begin.
        ends: where they end; a way may go on from one end to another.
        opaque: nodes that are not looked through, besides those of the functions that are known to be opaque.
        closed: nodes through which no way leads; one that is an end is reached.
        passes_opaque: whether ways lead through opaque nodes, too, for those who call no node.

    Attributes:
        order: the nodes, each after all of its consumers.
        inputs: for each node that was met, where the gradients of its inputs go. Torch makes that anew whenever it is read.
        ends: those of the ends that are on the route.
        hidden: the nodes behind opaque ones. None of them is on the route, since only a part of its gradient would arrive.
    """

    def __init__(
        self,
        starts: Iterable[Node],
        ends: Iterable[Node],
        opaque: Iterable[Node] = (),
        closed: Container[Node] = (),
        *,
        passes_opaque: bool = False,
    ):
        wanted, self._opaque, self._closed = set(ends), set(opaque), closed
        self._passes_opaque = passes_opaque
        self.inputs: dict[Node, tuple[tuple[Node | None, int], ...]] = {}
        reached, found_opaque = self._reached(starts)
        self.hidden = behind(found_opaque) if found_opaque else set()
        self._leads: dict[Node, bool] = {}  # node on the route -> whether it leads on to an end
        order: list[Node] = []
        for node in reached:
            if node in self.hidden:
                continue
            # Each look does this for each node of the graph, so that it is no function of its own.
            leads = False
            if node not in found_opaque and node not in closed:
                for child, _ in self.inputs[node]:
                    leads = leads or child in self._leads
            if leads or node in wanted:
                self._leads[node] = leads
                order.append(node)
        self.order = order[::-1]
        self.ends = wanted.intersection(self._leads)
        # Node -> what torch says of its outputs, which it makes anew whenever it is read, too.
        self._outputs: dict[Node, Any] = {}

    def _reached(self, starts: Iterable[Node]) -> tuple[list[Node], set[Node]]:
        """The starts and all that they were computed from, each after its inputs, and which of them are opaque.

        Nothing is looked for behind opaque nodes.
        """
        done: dict[Node, bool] = {}  # a node that was met -> whether its inputs are in the list
        found: list[Node] = []
        opaque: set[Node] = set()
        stack = list(dict.fromkeys(starts))
        while stack:
            node = stack[-1]
            if node in done:
                stack.pop()
                if not done[node]:
                    done[node] = True
                    found.append(node)
                continue
            done[node], self.inputs[node] = False, node.next_functions
            if node in self._opaque or (not self._passes_opaque and is_python_function(node) and is_opaque(node)):
                opaque.add(node)
                continue
            if node in self._closed:
                continue
            for child, _ in self.inputs[node]:
                if child is not None and child not in done:
                    stack.append(child)
        return found, opaque

    def flow(
        self,
        pending: dict[Edge, Tensor],
        arrive: Arrive,
        *,
        before: Callable[[Node], None] | None = None,
        call: Call = vjp_in_look,
        complete: bool = False,
        keeps_dtype: bool = False,
    ) -> None:
        """Let gradients flow down the route.

        Args:
            pending: the gradients at the starts; what flows is taken out of it.
            arrive: called with each end and the list of the gradients of its outputs, when these are complete; those that it
                replaces by None flow no further.
            before: called with each node before the node is.
            call: how a node is called.
            complete: whether every node has to give all gradients that are asked for.
            keeps_dtype: let gradients have another dtype than what they are gradients of, where nodes only move entries.

        Raises:
            CoverageError: if a node gives less than all, and ``complete``.
        """
        # All of it is read before anything flows. Read in between, it would stay where large gradients are freed, and the heap
        # could not put their places together for the next ones.
        if not self._outputs:
            self._outputs = {node: outputs_of(node) for node in self.order}
        for node in self.order:
            grads, arrived = [], False
            for nr in range(len(self._outputs[node])):
                grads.append(grad := pending.pop((node, nr), None))
                arrived = arrived or grad is not None
            if not arrived:
                continue
            if node in self.ends:
                arrive(node, grads)
            if not self._leads[node]:
                continue
            if before is not None:
                before(node)
            for (child, nr), result in zip(self.inputs[node], call(node, grads), strict=True):
                if child is None or child not in self._leads:
                    continue
                if result is None:
                    if complete:
                        raise _gives_nothing(node)
                    continue
                part = fitted(result, self._outputs[child][nr], keeps_dtype=keeps_dtype)
                there = pending.get((child, nr))
                pending[child, nr] = part if there is None else there + part


def behind(nodes: Iterable[Node]) -> set[Node]:
    """All that these nodes were computed from."""
    found: set[Node] = set()
    stack = list(nodes)
    while stack:
        for child, _ in stack.pop().next_functions:
            if child is not None and child not in found:
                found.add(child)
                stack.append(child)
    return found


def _gives_nothing(node: Node) -> CoverageError:
    return CoverageError(
        f"{node.name()} gives no gradient for what a parameter went into: the backward pass under way was asked for some "
        "gradients only (inputs=); call backward() without"
    )
