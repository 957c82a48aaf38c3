"""Backward passes through a graph that is there, its parameters' uses found in it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from torch_secorder.autograd.engine import current_node, in_search_pass, library_pass, search_pass
from torch_secorder.batch_axis.knowledge import Memory
from torch_secorder.capture.records import Forward, Record
from torch_secorder.errors import CoverageError, NonFiniteError, UnsupportedError
from torch_secorder.graph.audit import Audit
from torch_secorder.graph.frontier import ParameterUse
from torch_secorder.model.parameters import ParameterTable
from torch_secorder.per_sample import as_refusal
from torch_secorder.recording.accumulator import Pass
from torch_secorder.recording.sample_norms import Samples


class Passes:
    """Any number of backward passes through one graph, that write no ``.grad``.

    Args:
        table: the analysed parameters.
        memory: what is known about the model already.
        batch_axis: where the outputs have their samples.
        locate_on_three_samples: adds to the memory from a smaller batch, if there is a way.
        create_graph: make the squared norms differentiable.
        diagonal: also add up squares entry by entry.
        trust_shapes: believe shapes that allow one reading only, for callers that check a sample afterwards.
        max_memory: how many bytes the algebra may take for its temporaries at once.

    Attributes:
        n: how many samples the latest graph has.
        structure: tells that graph from graphs of other nodes.
    """

    def __init__(
        self,
        table: ParameterTable,
        memory: Memory,
        batch_axis: int = 0,
        locate_on_three_samples: Callable[[], None] | None = None,
        *,
        create_graph: bool = False,
        diagonal: bool = False,
        trust_shapes: bool = False,
        max_memory: int | None = None,
    ):
        self._table, self._memory, self._create_graph, self._diagonal = table, memory, create_graph, diagonal
        self._max_memory = max_memory
        self._audit = Audit(table, self._used, batch_axis, memory, locate_on_three_samples, trust_shapes=trust_shapes)
        self._pass: Pass | None = None
        self._error: Exception | None = None
        self._starts: list[tuple[Record | ParameterUse, list[GradientEdge]]] = []
        self._records: list[Record] = []
        self._inputs: Sequence[Tensor | GradientEdge] = []
        self._shared = False  # whether the graph is somebody else's, maybe with a monitor's hooks on it
        self._defers = False
        self._deferred: list[Callable[[], None]] = []  # what has to wait for the end of the backward pass
        self.n = self.structure = 0

    @contextmanager
    def through(self, outputs: Tensor) -> Iterator[None]:
        """Outputs that were computed before, whose graph is left as it was."""
        self._shared = True
        try:
            self.audited(Forward(len(outputs)), outputs)
            self._inputs = self._audit.other_leaves
            yield
        finally:
            self._audit.hooks.close()
            self._starts, self._inputs, self._shared = [], [], False

    def audited(self, forward: Forward, outputs: Any) -> None:
        """Prepare for backward passes from these outputs."""
        self._records += [record for record, _ in forward.records]
        uses = self._audit.uses(forward, outputs)
        self._starts = [
            (record, [edge]) for record, edge in forward.records if record.starts_graph and record.placement
        ]
        self._starts += [(use, use.edges(node)) for use, node in uses if use.is_first]
        self._defers = any(self._needs_node_calls(use) for use, _ in uses)
        self.n, self.structure = forward.n or 0, self._audit.fingerprint

    def active(self) -> bool:
        """Whether gradients that arrive now are of the pass under way."""
        return self._pass is not None and (self._shared or not in_search_pass())

    def backward(self, root: Tensor, seed: Tensor | None = None, *, last: bool = True) -> Samples:
        """Squared norms of the per-sample gradients of ``root`` (with ``seed`` for its gradient).

        Only what lies between the root and the first analysed layers' outputs is differentiated, so no parameter gradient
        is computed.

        Args:
            root: what is differentiated.
            seed: its gradient, for a root that is not a scalar.
            last: whether the graph may be freed.
        """
        keep = not last or self._create_graph
        self._pass = Pass(self._table, diagonal=self._diagonal, keep=keep, max_memory=self._max_memory)
        self._error = None
        try:
            if not root.requires_grad:
                return self._samples(root, seed, last)
            with (search_pass if self._shared else library_pass)([root]) as (start,):
                return self._samples(start, seed, last)
        finally:
            self._pass = None

    def _samples(self, root: Tensor, seed: Tensor | None, last: bool) -> Samples:
        edges = [edge for _, several in self._starts for edge in several]
        if root.requires_grad and (edges or self._inputs):
            self._deferred = []
            found = self._gradients(root, [*edges, *self._inputs], seed, not last or self._create_graph or self._defers)
            with torch.set_grad_enabled(self._create_graph):
                for action in self._deferred:
                    self._guarded(action)
                arrived = iter(found)
                for item, several in self._starts:
                    grads = tuple(itertools.islice(arrived, len(several)))
                    self._guarded(partial(self._add, item, several[0].node, grads))
                if self._error is not None:
                    raise self._error
                if self._pass:
                    self._memory.warned = self._memory.warned or self._pass.warned()
                    try:
                        return self._pass.finish()
                    except Exception as error:
                        raise as_refusal(error)  # noqa: B904  # which names its cause itself
        if not bool(root.isfinite().all()):
            raise NonFiniteError(
                "the outputs or their loss are not finite, in the first batch in which it was looked for where the model has its "
                "samples, which such a batch can't show"
            )
        raise CoverageError("the loss does not depend on any analysed parameter through a differentiable way")

    def _gradients(self, root: Tensor, inputs: list[Any], seed: Tensor | None, retain: bool) -> Sequence[Tensor | None]:
        options = {"retain_graph": retain, "create_graph": self._create_graph, "allow_unused": True}
        try:
            return torch.autograd.grad(root, inputs, seed, **options)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise UnsupportedError(
                "re-entrant activation checkpointing computes gradients only together with those of the parameters: use "
                "torch.utils.checkpoint with use_reentrant=False, or a FisherMonitor around your own backward"
            ) from error

    def _used(self, use: ParameterUse, grads: tuple[Tensor | None, ...]) -> None:
        if not self.active() or use.is_first:
            return
        assert self._pass is not None
        action = partial(self._pass.add_use, use, current_node(), grads)
        if self._needs_node_calls(use):
            self._deferred.append(action)
        else:
            self._guarded(action)

    def _needs_node_calls(self, use: ParameterUse) -> bool:
        return use.needs_node_calls or (self._diagonal and use.permutes_entries)

    def _add(self, item: Record | ParameterUse, node: Node, grads: tuple[Tensor | None, ...]) -> None:
        assert self._pass is not None
        if isinstance(item, ParameterUse):
            self._pass.add_use(item, node, grads)
        elif grads[0] is not None:
            self._pass.add(item, grads[0])

    def _guarded(self, action: Callable[[], None]) -> None:
        """Do something inside of a backward pass, which must not be left half-way."""
        if self._error is None and self._pass is not None:
            try:
                action()
            except Exception as error:
                self._error = as_refusal(error)
