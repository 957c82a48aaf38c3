"""Backward passes from outputs that the user computed before, through a graph that may have hooks of the user's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from torch_secorder.autograd.graph_pass import GraphPass
from torch_secorder.autograd.nodes import output_dtype, value_shape
from torch_secorder.autograd.opaque import Gradients
from torch_secorder.autograd.sharded import GatheredWeights
from torch_secorder.batch_axis.placement import FIRST, Layout
from torch_secorder.capture.model_run import Forward
from torch_secorder.graph.last_layer import inputs_of_last_product, last_product, norms_go_by_sizes
from torch_secorder.graph.refusals import hidden
from torch_secorder.graph.uses import IdleUse, ParameterUse
from torch_secorder.per_sample import squared_norm_of_rows
from torch_secorder.recording.backward_pass import BackwardPass
from torch_secorder.recording.sample_norms import SampleNorms
from torch_secorder.running.by_last_layer import stand_ins
from torch_secorder.running.graph_backward import GraphBackward

# How many passes share one pass of the engine, and how many bytes the gradients may take that they begin with.
MOST_PASSES, MOST_BYTES = 64, 2**24


@dataclass(eq=False)
class _Graph:
    """What is known of the graph that the passes go through.

    Attributes:
        outputs: what the user computed.
        uses: the node of each use of parameters -> the use.
        sized: those of them at which squared norms go by the sizes of gradients, in plain tensors.
    """

    outputs: Tensor
    uses: dict[Node, ParameterUse | IdleUse]
    sized: set[Node] = field(default_factory=set)


class OutputsBackward(GraphBackward):
    """Any number of backward passes through the graph of some outputs, in which nobody else's code runs.

    At a product of samples with a matrix, a sample's squared norms are ``||g_n||^2``, the size of its gradient there, times a
    factor that all passes share. A sum over many passes therefore takes the sum of the sizes, and the norms once at its end.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._graph: _Graph | None = None
        self._passes: GraphPass | None = None  # through the whole graph

    @contextmanager
    def through(self, outputs: Tensor) -> Iterator[None]:
        """A block in which passes go through the graph of these outputs."""
        try:
            found = self._found_uses(Forward(len(outputs), placements=[FIRST]), [outputs])
            uses: dict[Node, ParameterUse | IdleUse] = {node: use for use, node in found.placed}
            self._graph = _Graph(outputs, uses | {node: idle for idle, node in found.idle})
            self._graph.sized = {use for use in self._graph.uses if self._goes_by_sizes(use)}
            self._passes = self._passes_to(self._graph.uses)
            yield
        finally:
            self._graph = self._passes = None

    @property
    def graph(self) -> _Graph:
        """The graph, inside of the block."""
        assert self._graph is not None
        return self._graph

    def _passes_to(self, wanted: Iterable[Node], start: GradientEdge | None = None) -> GraphPass:
        weights = GatheredWeights(throughout=self.table.sharded)
        return GraphPass([self.graph.outputs], wanted, create_graph=self._create_graph, weights=weights, start=start)

    def _goes_by_sizes(self, node: Node) -> bool:
        """Whether a use's squared norms go by the sizes of the gradients, of samples that each have one row of their own."""
        use = self.graph.uses[node]
        if isinstance(use, IdleUse) or use.placement != FIRST or not norms_go_by_sizes(node, use):
            return False
        return value_shape(node, 0)[0] == self.n and output_dtype(node, 0) in (torch.float32, torch.float64)

    def before_last_product(self, positions: int) -> tuple[Node, GraphPass | None] | None:
        """The product that made the outputs, and passes that begin at its inputs.

        The passes are None if no analyzed parameter comes before the product. The result is None if the graph has no such
        product, or if its parameters' shares depend on more than the size of the gradient of each sample's positions.

        Args:
            positions: how many rows of the product a sample has.
        """
        node, uses = last_product(self.graph.outputs), self.graph.uses
        use = None if node is None else uses.get(node)
        if node is None or not isinstance(use, ParameterUse) or (start := inputs_of_last_product(node, use)) is None:
            return None
        if use.placement.layout is not (Layout.ONE_EACH if positions == 1 else Layout.BLOCKS):
            return None
        before = [other for other in uses if other is not node]
        return node, self._passes_to(before, start) if before else None

    # ------------------------------------------------------------------------------------------------ passes

    def of_seed(self, seed: Tensor, passes: GraphPass | None = None) -> SampleNorms:
        """The squared norms of the samples' gradients after one pass that begins with ``seed``, by default at the outputs."""
        passes = passes or self._passes
        assert passes is not None
        with self._pass() as current:
            passes.run(lambda: [seed.clone()], partial(self._arrived, current))
            self._require_seen(passes)
            return self._finished(current, self.graph.outputs, ())

    def of_seeds(self, seeds: Iterable[Tensor], passes: GraphPass) -> Tensor:
        """The sum of the squared norms over many passes, ``[parameters, n]``.

        Args:
            seeds: what the passes begin with, on which nodes may write.
            passes: their way.
        """
        sizes: dict[Node, Tensor] = {}
        if not (passes.is_plain and passes.ends and passes.ends <= self.graph.sized):
            return reduce(torch.add, (self.of_seed(seed, passes).squared_norms for seed in seeds))
        self._require_seen(passes)
        rest = iter(seeds)
        for seed in rest:
            several = min(MOST_PASSES, max(1, MOST_BYTES // (seed.numel() * seed.element_size())))
            passes.run_each([seed, *islice(rest, several - 1)], partial(_add_sizes, sizes))
        # One gradient of the size of all of them stands for all.
        return self.at({node: next(stand_ins(squares, value_shape(node, 0)[1])) for node, squares in sizes.items()})

    def at(self, gradients: Mapping[Node, Tensor]) -> Tensor:
        """The squared norms of the uses at some nodes, given the gradients there, ``[parameters, n]``."""
        with self._pass() as current:
            for node, gradient in gradients.items():
                self._arrived(current, node, (gradient,))
            return self._finished(current, self.graph.outputs, ()).squared_norms

    def _arrived(self, current: BackwardPass, node: Node, grads: Gradients) -> None:
        use, grads = self.graph.uses[node], tuple(grads)
        if isinstance(use, IdleUse):
            self._within(current, use, current.accumulator.add_idle, use, grads)
        elif self._needs_node_calls(use):
            self._deferred.append((use, node, grads))
        else:
            self._within(current, use, current.accumulator.add_use, use, node, grads)

    def _require_seen(self, passes: GraphPass) -> None:
        if not passes.hidden.isdisjoint(self.graph.uses):
            raise hidden("a parameter's use", self.n)


def _add_sizes(sizes: dict[Node, Tensor], node: Node, grads: Gradients) -> None:
    (grad,) = grads
    assert grad is not None
    squares = squared_norm_of_rows(grad)
    sizes[node] = squares if node not in sizes else sizes[node] + squares
