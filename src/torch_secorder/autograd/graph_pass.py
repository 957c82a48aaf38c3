"""A pass through a graph that calls its nodes one by one, as the engine would, but runs nobody else's code.

No hook of the user's runs in it, no gradient is retained, and nothing is accumulated, in ``.grad`` or elsewhere. A node that
would call the user's modules, start a backward pass of its own or change what it keeps is opaque: what lies behind it is not
seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from torch_secorder.autograd.engine import looking, without_modes
from torch_secorder.autograd.guard import guarded
from torch_secorder.autograd.nodes import Edge, has_packed_tensors, is_python_function
from torch_secorder.autograd.opaque import FoundOpaqueError, Gradients, called_or_opaque
from torch_secorder.autograd.precision import deterministic_convolutions, full_precision
from torch_secorder.autograd.random_state import forked_random
from torch_secorder.autograd.route import Arrive, Route
from torch_secorder.autograd.sharded import GatheredWeights, passes_on


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

    @property
    def ends(self) -> set[Node]:
        """Those of the wanted nodes that the passes reach."""
        return self._route.ends

    @cached_property
    def is_plain(self) -> bool:
        """Whether all nodes are torch's own and hold what they saved, so that several passes may share one of the engine's."""
        return not any(map(_is_special, self._route.order))

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
            except FoundOpaqueError as found:
                self._opaque.append(found.node)
                self._route = self._found_route()

    def run_each(self, gradients: Iterable[Tensor], arrive: Arrive) -> None:
        """Several passes in one of the engine's, if the nodes are plain; each begins at the only root with one of the gradients.

        Args:
            gradients: what the passes begin with, on which nodes may write.
            arrive: called with each wanted node that is reached, and the gradients of its outputs. It calls no nodes.
        """
        (edge,) = self._edges

        def flow() -> None:
            for gradient in gradients:
                self._route.flow(
                    {(edge.node, edge.output_nr): gradient}, arrive, before=self._before, call=_called_plainly
                )

        self._in_engine(flow)

    def _run(self, gradients: Callable[[], Sequence[Tensor]], arrive: Arrive) -> None:
        pending: dict[Edge, Tensor] = {}
        for edge, gradient in zip(self._edges, gradients(), strict=True):
            key = (edge.node, edge.output_nr)
            pending[key] = pending[key] + gradient if key in pending else gradient

        self._in_engine(partial(self._route.flow, pending, arrive, before=self._before, call=self._called))

    def _in_engine(self, flow: Callable[[], None]) -> None:
        """Let gradients flow inside of a pass of the engine's."""

        def in_look() -> None:
            with (
                looking(),
                calling_nodes(self._roots),
                self._weights.during_pass(),
                torch.set_grad_enabled(self._create_graph),
            ):
                flow()

        with torch.enable_grad():
            start = _Start.apply(in_look, *self._roots)  # type: ignore[no-untyped-call]  # torch does not type it.
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
            if _is_special(node):
                return called_or_opaque(node, grads)
            self._plain.add(node)
        return _called_plainly(node, grads)


def _is_special(node: Any) -> bool:
    """Whether a node is one of Python's, or does not hold all that it saved."""
    return is_python_function(node) or passes_on(node) or has_packed_tensors(node) is not False


def _called_plainly(node: Any, grads: Gradients) -> list[Tensor | None]:
    results = node(*grads)
    return list(results) if isinstance(results, tuple) else [results]


@contextmanager
def calling_nodes(near: Iterable[Tensor]) -> Iterator[None]:
    """A block that calls nodes of the user's graph by itself, on the devices of these tensors, and that nobody's code notices."""
    with without_modes(), guarded(), forked_random(near), full_precision(), deterministic_convolutions():
        yield


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
