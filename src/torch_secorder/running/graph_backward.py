"""Backward passes that the library makes through an existing graph, in which it has found the parameters' uses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from torch_secorder.autograd.engine import (
    LIBRARY_PASSES,
    computes_gradient_of,
    current_graph_task,
    current_node,
    library_pass,
    refusing_checkpoints,
)
from torch_secorder.autograd.nodes import edges_of, made_by
from torch_secorder.autograd.roots import leads_to_older
from torch_secorder.autograd.route import behind
from torch_secorder.autograd.tensor_hooks import untouched
from torch_secorder.batch_axis.samples import BatchSamples
from torch_secorder.batch_axis.trust import Trust
from torch_secorder.capture.model_run import Forward
from torch_secorder.capture.records import Record
from torch_secorder.errors import CoverageError
from torch_secorder.graph.refusals import not_finite
from torch_secorder.graph.uses import IdleUse, ParameterUse, Uses
from torch_secorder.recording.backward_pass import BackwardPass
from torch_secorder.recording.quantities import QUANTITIES
from torch_secorder.recording.recorder import Recorder
from torch_secorder.recording.sample_norms import SampleNorms


class GraphBackward(Recorder):
    """Any number of backward passes through one graph, which write no ``.grad``.

    Args:
        create_graph: whether the squared norms are differentiable.
        trust_shapes: as :attr:`Trust.shapes`.
        options: as for :class:`Recorder`.

    Attributes:
        n: the number of samples in the latest graph.
        samples: where the samples are in the model's arguments and outputs.
        fingerprint: a hash of the graph: equal for graphs with the same nodes in the same order and the same pattern of sizes.
    """

    counts_again = True

    def __init__(self, *args: Any, create_graph: bool = False, trust_shapes: bool = False, **options: Any):
        super().__init__(*args, trust=Trust(trust_shapes, numbers=not create_graph, first_axis=True), **options)
        self._create_graph = create_graph
        self._takes_forms = any(QUANTITIES[name].takes_forms for name in self.options.quantities)
        self._current: BackwardPass | None = None
        self._count = 0  # how many passes there were so far
        self._first_node = 0  # the number of the first node that was made for them
        self._starts: list[tuple[Record | ParameterUse | IdleUse, list[GradientEdge]]] = []
        # The calls of which another one's gradient, a result of the pass, is also the gradient.
        self._sharing: set[Record] = set()
        self._inputs: Sequence[Tensor] = []  # the model's inputs that require a gradient
        self._leaves: list[GradientEdge] = []  # leaves that the model made in its forward
        self._defers = False
        # Uses whose rules call nodes have to wait for the end of the backward pass.
        self._deferred: list[tuple[ParameterUse, Node | None, tuple[Tensor | None, ...]]] = []
        self._shapes: list[tuple[int, ...]] = []  # the shapes of the outputs that have a gradient
        self.n = self.fingerprint = 0
        self.samples = BatchSamples(0)

    def _on_model_exit(self, forward: Forward, outputs: list[Tensor]) -> None:
        """Prepare for backward passes from these outputs."""
        uses = self._found_uses(forward, outputs)
        self._shapes = [tuple(x.shape) for x in outputs if x.requires_grad]
        self._starts = [(record, [edge]) for record, edge in forward.records if self._is_start(record)]
        self._starts += [(use, edges_of(node)) for use, node in uses.placed if use.is_first]
        self._starts += [(idle, edges_of(node)) for idle, node in uses.idle]
        # No hook runs before a node at which a pass ends. A module that returns its input, or a view of it, shares that node.
        ends = {(edge.node, edge.output_nr) for _, several in self._starts for edge in several}
        shared = [(record, edge) for record, edge in forward.records if (edge.node, edge.output_nr) in ends]
        self._sharing = {record for record, _ in shared if record.placement is not None and not self._is_start(record)}
        self._starts += [(record, [edge]) for record, edge in shared if record in self._sharing]
        self._leaves = self._leaves_of_the_model()
        # If no gradient is expected behind a use, the use's own node runs in the pass, too, and is called again later.
        idle = uses.idle or any(record.idle for record, _ in forward.records)
        self._defers = bool(idle) or any(self._needs_node_calls(use) for use, _ in uses.placed)
        for use, node in uses.placed:
            if not use.is_first:  # The gradients of first uses are results of the pass.
                self._hook(use, node)

    def _leaves_of_the_model(self) -> list[GradientEdge]:
        """Where leaves that the model made itself get their gradients; calls behind such leaves do not start the graph."""
        if not (leaves := self._audit.other_leaves):
            return []
        nodes = list(map(made_by, self._inputs))
        outside = {*nodes, *behind(nodes)}
        return [GradientEdge(node, 0) for node in leaves if node not in outside]

    @staticmethod
    def _is_start(record: Record) -> bool:
        """Whether a call's gradient is a result of the pass: nothing analyzed comes before it, or no gradient is expected."""
        return record.idle is not None if record.placement is None else record.starts_graph

    def _found_uses(self, forward: Forward, outputs: list[Tensor]) -> Uses:
        uses = super()._found_uses(forward, outputs)
        for use, node in uses.placed:
            use.note_node_calls(node)
        if forward.refusal is not None:
            raise forward.refusal
        self.n, self.fingerprint = forward.n or 0, self._audit.fingerprint
        self.samples = BatchSamples(self.n, self.plan.words, forward.count.indices, forward.count.is_of_bags)
        return uses

    def backward(
        self,
        root: Tensor,
        seed: Tensor | None = None,
        *,
        last: bool = True,
        end: Tensor | None = None,
    ) -> SampleNorms:
        """Squared norms of the per-sample gradients of ``root``, with ``seed`` as the gradient that the pass starts with.

        Only what lies between the root and the first analyzed layers' outputs is differentiated, so no parameter gradient
        is computed.

        Args:
            root: what is differentiated.
            seed: its gradient, for a root that is not a scalar.
            last: whether the graph may be freed.
            end: where a pass through the library's own graph ends, if not at the first analyzed layers' outputs.
        """
        with self._pass(keep_inputs=not last) as current:
            ends: list[Any] = [*(edge for _, several in self._starts for edge in several), *self._inputs, *self._leaves]
            if root.requires_grad and ends:
                keeps = not last or self._create_graph or self._defers
                retain = keeps or leads_to_older(root, self._first_node)
                with library_pass([root]) as (start,), untouched(self.table.leaves):
                    found = self._differentiated(start, ends if end is None else [end], seed, retain)
                    found = found if end is None else [None] * len(ends)
                    return self._finished(current, root, found)
            raise self._nothing_found(root)

    @contextmanager
    def _pass(self, *, keep_inputs: bool = True) -> Iterator[BackwardPass]:
        """A block in which one backward pass is under way."""
        self._count += 1
        current = self._current = self.lifecycle.begin(self._count, keep_inputs=keep_inputs or self._create_graph)
        try:
            yield current
        finally:
            self._current, self._deferred = None, []  # What holds nodes must not outlive the pass.

    def _differentiated(
        self, root: Tensor, inputs: list[Any], seed: Tensor | None, retain: bool
    ) -> Sequence[Tensor | None]:
        """The gradients at places before which nothing is analyzed; all other gradients arrive at hooks during the pass."""
        options = {"retain_graph": retain, "create_graph": self._create_graph, "allow_unused": True}
        packed = [item for item, _ in self._starts if isinstance(item, Record) and item.inputs_packed]
        if packed:
            assert root.grad_fn is not None
            root.grad_fn.register_prehook(partial(_fetch_inputs, packed))
        with refusing_checkpoints():
            return torch.autograd.grad(root, inputs, seed, **options)

    def _finished(self, current: BackwardPass, root: Tensor, found: Sequence[Tensor | None]) -> SampleNorms:
        with torch.set_grad_enabled(self._create_graph):
            for use, node, grads in self._deferred:
                self._within(current, use, current.accumulator.add_use, use, node, grads)
            arrived = iter(found)
            for item, several in self._starts:
                grads = tuple(itertools.islice(arrived, len(several)))
                if isinstance(item, ParameterUse):
                    self._within(current, item, current.accumulator.add_use, item, several[0].node, grads)
                elif item.idle is not None:
                    if any(grad is not None for grad in grads):
                        self._within(current, item, current.accumulator.add_idle, item, grads)
                elif grads[0] is not None:
                    self._within(current, item, self._add_start, current, item, grads[0])
            if current.error is None and current.accumulator.is_empty:
                raise self._nothing_found(root)
            return self.lifecycle.finish(current)

    def _add_start(self, current: BackwardPass, record: Record, grad: Tensor) -> None:
        """Add the gradient of a layer before which nothing is differentiated."""
        with self.forwards.recomputing():
            current.accumulator.add(record, grad)

    def _nothing_found(self, root: Tensor) -> Exception:
        if not bool(root.isfinite().all()):
            return not_finite("the outputs or their loss")
        return CoverageError(
            "no gradient of the loss reaches an analyzed parameter through the outputs that were looked at, of the shapes "
            f"{', '.join(map(str, self._shapes)) or '(none has a gradient)'}: the loss takes no gradient from them (.detach(), "
            ".item(), argmax), or what they are computed from is not analyzed"
        )

    # ------------------------------------------------------------------------------------------------ what arrives

    def _pass_under_way(
        self, grads: Sequence[Tensor | None] = (), recomputed_in: int | None = None
    ) -> BackwardPass | None:
        if self._current is None or self._is_of_inputs_only(current_graph_task()):
            return None
        return self._current

    def _is_of_inputs_only(self, task: int) -> bool:
        """Whether a hook or a function of the user's has started a pass inside of ours for gradients of other things.

        An equilibrium solves for its gradient by such passes, through a call of its own that no output was computed from.
        """
        if task == -1 or task in LIBRARY_PASSES or len(self._audit.leaves) < len(self.table.leaves):
            return False
        return not any(map(computes_gradient_of, self._audit.leaves))

    def _on_output_gradient(
        self, record: Record, output_nr: int, returned: object, grads: tuple[Tensor | None, ...]
    ) -> None:
        if not self._is_start(record) and record not in self._sharing:
            super()._on_output_gradient(record, output_nr, returned, grads)

    def _on_use_gradients(self, use: ParameterUse, returned: object, grads: tuple[Tensor | None, ...]) -> None:
        current = self._pass_under_way()
        if current is None:
            return
        if self._needs_node_calls(use):
            self._deferred.append((use, current_node(), grads))
        else:
            super()._on_use_gradients(use, returned, grads)

    def _needs_node_calls(self, use: ParameterUse) -> bool:
        return use.needs_node_calls or (use.permutes_entries and self._takes_forms)


def _fetch_inputs(records: list[Record], _: object) -> None:
    """Fetch the inputs of calls inside of the pass, where each checkpoint runs its forward again once for all requests.

    Selective checkpoints allow only one such run.
    """
    for record in records:
        record.fetch_inputs()
