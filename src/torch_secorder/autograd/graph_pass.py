"""A pass through a graph that calls its nodes one by one, as the engine would, but runs nobody else's code.

No hook of the user's runs in it, no gradient is retained, and nothing is accumulated, in ``.grad`` or elsewhere. A node that
would call the user's modules, start a backward pass of its own or change what it keeps is opaque: what lies behind it is not
seen.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from torch_secorder.autograd.engine import looking, without_modes
from torch_secorder.autograd.guard import RunsOthersCodeError, guarded
from torch_secorder.autograd.nodes import (
    Edge,
    fitted,
    has_others_hooks,
    has_packed_tensors,
    is_others_function,
    is_python_function,
    keeps_state,
    node_vjp,
    output_count,
    outputs_of,
)
from torch_secorder.autograd.precision import deterministic_convolutions, full_precision
from torch_secorder.autograd.random_state import forked_random
from torch_secorder.autograd.sharded import GatheredWeights, passes_on
from torch_secorder.errors import CoverageError

Gradients = Sequence[Tensor | None]
Arrive = Callable[[Node, Gradients], None]

# The classes of Python functions that were found to run the user's code in their backward.
_opaque_functions: set[Any] = set()
_tried_functions: set[Any] = set()


class Route:
    """The nodes on the ways from some nodes down to others.

    Args:
        starts: where the ways begin.
        ends: where they end; a way may go on from one end to another.
        opaque: nodes that are not looked through, besides those of the functions that are known to be opaque.
        closed: nodes through which no way leads.

    Attributes:
        order: the nodes, each after all of its consumers.
        ends: those of the ends that are on the route.
        hidden: the nodes behind opaque ones. None of them is on the route, since only a part of its gradient would arrive.
    """

    def __init__(
        self,
        starts: Iterable[Node],
        ends: Iterable[Node],
        opaque: Iterable[Node] = (),
        closed: Container[Node] = (),
    ):
        wanted, self._opaque, self._closed = set(ends), set(opaque), closed
        reached, found_opaque = self._reached(starts)
        self.hidden = behind(found_opaque) if found_opaque else set()
        self._leads: dict[Node, bool] = {}  # node on the route -> whether it leads on to an end
        order: list[Node] = []
        for node in reached:
            if node in self.hidden or node in closed:
                continue
            # Each look does this for each node of the graph, so that it is no function of its own.
            leads = False
            if node not in found_opaque:
                for child, _ in node.next_functions:
                    leads = leads or child in self._leads
            if leads or node in wanted:
                self._leads[node] = leads
                order.append(node)
        self.order = order[::-1]
        self.ends = wanted.intersection(self._leads)
        # Node -> what torch says of its outputs. Torch makes that anew whenever it is read.
        self._outputs: dict[Node, Any] = {}

    def _is_opaque(self, node: Any) -> bool:
        if node in self._opaque:
            return True
        if not is_python_function(node):
            return False
        # A re-entrant checkpoint doesn't compute the gradients that it is asked for, and accumulates those of the parameters.
        return (
            node.name() == "CheckpointFunctionBackward" or node._forward_cls in _opaque_functions or keeps_state(node)
        )

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
            done[node] = False
            if self._is_opaque(node):
                opaque.add(node)
                continue
            if node in self._closed:
                continue
            for child, _ in node.next_functions:
                if child is not None and child not in done:
                    stack.append(child)
        return found, opaque

    def flow(
        self,
        pending: dict[Edge, Tensor],
        arrive: Arrive,
        *,
        before: Callable[[Node], None] | None = None,
        call: Callable[[Node, Gradients], list[Tensor | None]] = node_vjp,
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
        for node in self.order:
            if (outputs := self._outputs.get(node)) is None:
                outputs = self._outputs[node] = outputs_of(node)
            grads, arrived = [], False
            for nr in range(len(outputs)):
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
            for (child, nr), result in zip(node.next_functions, call(node, grads), strict=True):
                if child is None or child not in self._leads:
                    continue
                if result is None:
                    if complete:
                        raise _gives_nothing(node)
                    continue
                if (outputs := self._outputs.get(child)) is None:
                    outputs = self._outputs[child] = outputs_of(child)
                part, there = fitted(result, outputs[nr], keeps_dtype=keeps_dtype), pending.get((child, nr))
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


def _called_or_opaque(node: Any, grads: Gradients) -> list[Tensor | None]:
    """Call a node in a look."""
    if has_others_hooks(node):
        raise _FoundOpaque(node)
    try:
        return list(grads) if passes_on(node) else node_vjp(node, grads)
    except RunsOthersCodeError as error:
        if is_python_function(node):
            _opaque_functions.add(node._forward_cls)
        raise _FoundOpaque(node) from error


def runs_others_code(node: Any) -> bool:
    """Whether a node is that of a function that calls modules or starts a backward pass in its backward.

    Each function is tried once. A function that keeps a module or something else to call is not tried, since that might change
    what it keeps, but taken for such a function.
    """
    if not is_others_function(node):
        return False
    kind = node._forward_cls
    if keeps_state(node):
        return kind in _opaque_functions or any(callable(value) for value in vars(node).values())
    if kind not in _tried_functions:
        _tried_functions.add(kind)
        try:
            with guarded(), forked_random(), torch.no_grad():
                node_vjp(node, [None] * output_count(node))
        except RunsOthersCodeError:
            _opaque_functions.add(kind)
        except Exception:  # It raises the same when it is called in earnest.
            return False
    return kind in _opaque_functions


def _gives_nothing(node: Node) -> CoverageError:
    return CoverageError(
        f"{node.name()} gives no gradient for what a parameter went into: the backward pass under way was asked for some "
        "gradients only (inputs=); call backward() without"
    )


class GraphPass:
    """Passes from the same tensors to the same nodes, as many as are run.

    Args:
        roots: where the passes begin.
        wanted: the nodes whose outputs' gradients are wanted.
        create_graph: make these gradients differentiable.
        weights: gathers the weights that are in parts on several ranks.
        start: a place behind the roots, if the passes begin there, with one gradient.
    """

    def __init__(
        self,
        roots: Sequence[Tensor],
        wanted: Iterable[Node],
        *,
        create_graph: bool = False,
        weights: GatheredWeights | None = None,
        start: GradientEdge | None = None,
    ):
        self._roots, self._wanted, self._create_graph = list(roots), list(wanted), create_graph
        self._weights = weights or GatheredWeights()
        self._before = None if weights is None else weights.before
        self._edges = [start] if start is not None else [torch.autograd.graph.get_gradient_edge(x) for x in roots]
        self._opaque: list[Node] = []
        self._plain: set[Node] = set()  # torch's own nodes that hold all that they saved, which just have to be called
        self._route = self._found_route()

    @property
    def hidden(self) -> set[Node]:
        """What lies behind opaque nodes. Of wanted nodes among them no gradient is known."""
        return self._route.hidden

    def _found_route(self) -> Route:
        return Route([edge.node for edge in self._edges], self._wanted, self._opaque)

    def run(self, gradients: Callable[[], Sequence[Tensor]], arrive: Arrive) -> None:
        """One pass.

        Args:
            gradients: the roots' gradients, made anew for each call, since a node may write on them.
            arrive: called with each wanted node that is reached, and the gradients of its outputs. If a node turns out to be
                opaque, the pass begins anew; what came in before is to be replaced.
        """
        while self._route.ends:
            try:
                self._run(gradients, arrive)
                return
            except _FoundOpaque as found:
                self._opaque.append(found.node)
                self._route = self._found_route()

    def _run(self, gradients: Callable[[], Sequence[Tensor]], arrive: Arrive) -> None:
        pending: dict[Edge, Tensor] = {}
        for edge, gradient in zip(self._edges, gradients(), strict=True):
            key = (edge.node, edge.output_nr)
            pending[key] = pending[key] + gradient if key in pending else gradient

        def flow() -> None:
            with (
                looking(),
                without_modes(),
                guarded(),
                forked_random(self._roots),
                full_precision(),
                deterministic_convolutions(),
                self._weights.during_pass(),
                torch.set_grad_enabled(self._create_graph),
            ):
                self._route.flow(pending, arrive, before=self._before, call=self._called)

        with torch.enable_grad():
            start = _Start.apply(flow, *self._roots)  # type: ignore[no-untyped-call]  # torch does not type it.
        ends = [GradientEdge(node, 0) for node in self._route.ends]
        try:
            with torch.autograd.set_detect_anomaly(False):
                # Compiled functions free what they saved unless the pass retains the graph.
                torch.autograd.grad(start, ends, torch.zeros_like(start), retain_graph=True, allow_unused=True)
        except _OverError:
            return

    def _called(self, node: Any, grads: Gradients) -> list[Tensor | None]:
        """The gradients of a node's inputs. What decides how it is called is the same in each pass."""
        if node not in self._plain:
            if is_python_function(node) or passes_on(node) or has_packed_tensors(node) is not False:
                return _called_or_opaque(node, grads)
            self._plain.add(node)
        results = node(*grads)
        return list(results) if isinstance(results, tuple) else [results]


class _Start(torch.autograd.Function):
    """The only node of ours that the engine calls for a pass. It breaks the engine's pass off before any other node runs.

    Inside, nodes know which of their inputs' gradients are wanted, so that those of weights are not computed in vain, and
    checkpoints take everything for one pass, so that each runs its forward again once.
    """

    @staticmethod
    def forward(ctx: Any, flow: Callable[[], None], *roots: Tensor) -> Tensor:
        ctx.flow = flow
        ctx.set_materialize_grads(False)
        return torch.zeros((), device="cpu")  # where its node runs in the thread that asks for it

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        ctx.flow()
        raise _OverError


class _OverError(Exception):
    """The pass is over."""


class _FoundOpaque(Exception):
    """A node turned out to be opaque."""

    def __init__(self, node: Node):
        super().__init__(node.name())
        self.node = node
