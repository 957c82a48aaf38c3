"""One forward of a model under hooks, for any number of backward passes through it; and what leaves the user's model alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from torch_secorder.autograd.engine import call_model
from torch_secorder.autograd.versions import hiding_changes
from torch_secorder.batch_axis.knowledge import Memory
from torch_secorder.capture.module_hooks import Capture
from torch_secorder.capture.records import Record
from torch_secorder.errors import UnsupportedError
from torch_secorder.graph.audit import Audit
from torch_secorder.graph.frontier import Use
from torch_secorder.graph.queries import without_second_derivative
from torch_secorder.model.containers import rows, tensors
from torch_secorder.model.hooks import HookScope
from torch_secorder.model.parameters import ParameterTable
from torch_secorder.model.restore import (
    forked_random,
    random_state,
    restoring_buffers,
    twice_differentiable,
)
from torch_secorder.recording.plan import Plan
from torch_secorder.running.graph_backward import Passes


class Run(HookScope, Passes):
    """``with Run(...) as run: outputs = run(inputs); samples = run.backward(loss)``: one forward of a model under hooks.

    Args:
        model: the model, unwrapped.
        plan: how it is captured.
        activations: also watch every module's output.
        options: as for :class:`Passes`.

    Attributes:
        random: whether the latest forward drew from the global random state.
    """

    def __init__(
        self,
        model: nn.Module,
        table: ParameterTable,
        plan: Plan,
        memory: Memory,
        *,
        activations: bool = False,
        **options: Any,
    ):
        super().__init__(table, memory, plan.batch_axis, self._rehearse, **options)
        self._model, self._plan = model, plan
        sites = plan.sites + (plan.watched(model) if activations else [])
        self._capture = Capture(
            *(model, sites, self._arrived, plan.batch_axis, plan.guards),
            on_end=self.audited,
            anchored=bool(table.coded),
            alone=True,
        )
        self._arguments: Any = None
        self.random = False

    def active(self) -> bool:
        """Whether gradients that arrive now are of the pass under way, and not of a rehearsal."""
        return self._capture.active and super().active()

    def _attach(self) -> None:
        self._capture.__enter__()

    def _detach(self) -> None:
        self._capture.__exit__()
        for record in self._records:
            record.inputs, record.kwargs = None, {}  # the graph, which may outlive this, has the records in its hooks
        self._starts, self._arguments, self._records = [], None, []

    def __call__(self, inputs: Any) -> Any:
        """The model's outputs: a tensor is the argument, a tuple all positional and a mapping all keyword arguments."""
        self._arguments = inputs
        self._inputs = [x for x in tensors(inputs) if x.requires_grad]
        before = random_state()
        with torch.enable_grad(), twice_differentiable(self._create_graph):
            outputs = call_model(self._model, inputs)
        self.random = not all(map(torch.equal, before, random_state()))
        if self._create_graph:
            check_twice_differentiable(outputs, self._table)
        return outputs

    def _rehearse(self) -> None:
        """See where samples are in a batch of three of them, which costs far less than in the whole batch."""
        n, axis = self._capture.last.n, self._plan.batch_axis
        if n is None or n < 8:
            return
        few = rows(self._arguments, [0, 1, 2], n, axis)
        capture = Capture(
            *(self._model, self._plan.sites, lambda record, grad: None, axis),
            on_end=lambda *found: audit.uses(*found),
            anchored=bool(self._table.coded),
            alone=True,
        )
        audit = Audit(self._table, lambda use, grads: None, axis, self._memory)
        self._capture.active = False
        try:
            with (
                forked_random(self._table.tensors),
                hiding_changes(self._model),
                restoring_buffers(self._model),
                torch.enable_grad(),
                capture,
            ):
                call_model(self._model, few)
        finally:
            self._capture.active = True

    def _add(self, item: Record | Use, node: Node, grads: tuple[Tensor | None, ...]) -> None:
        with self._capture.again():
            super()._add(item, node, grads)

    def _arrived(self, record: Record, grad: Tensor) -> None:
        if not record.starts_graph:  # those that do come from _gradients
            self._guarded(lambda: None if self._pass is None else self._pass.add(record, grad))


def check_twice_differentiable(outputs: Any, table: ParameterTable) -> None:
    """Raise if the graph of these outputs has a fused operation that can't be differentiated twice."""
    if found := without_second_derivative(outputs, table):
        what, remedy = found
        raise UnsupportedError(
            f"create_graph: {what} has no second derivative; compute it under {remedy}, by operations that have one"
        )
