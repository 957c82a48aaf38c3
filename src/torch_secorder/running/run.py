"""One forward of a model under hooks, for any number of backward passes through it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from torch_secorder.autograd.engine import call_model
from torch_secorder.autograd.indices import checked_on_host
from torch_secorder.autograd.node_hooks import has_others_hooks_on_gradient, has_others_hooks_on_node
from torch_secorder.autograd.random_state import forked_random, random_state
from torch_secorder.autograd.roots import next_sequence_number
from torch_secorder.autograd.twice_differentiable import twice_differentiable
from torch_secorder.autograd.versions import hiding_changes
from torch_secorder.batch_axis.knowledge import ModelKnowledge
from torch_secorder.batch_axis.placement import FIRST
from torch_secorder.batch_axis.samples import BatchSamples
from torch_secorder.batch_axis.trust import Trust
from torch_secorder.capture.model_run import Forward
from torch_secorder.capture.records import Record
from torch_secorder.errors import UnsupportedError
from torch_secorder.graph.last_layer import last_linear_factors, last_product
from torch_secorder.graph.queries import without_second_derivative
from torch_secorder.likelihoods import LastLayer
from torch_secorder.model.containers import tensors
from torch_secorder.model.parameters import ParameterTable, numpy_of_frozen
from torch_secorder.model.restore import restoring_state
from torch_secorder.recording.backward_pass import BackwardPass
from torch_secorder.recording.options import PassOptions
from torch_secorder.recording.plan import Plan
from torch_secorder.recording.recorder import Recorder
from torch_secorder.rules.linear import linear
from torch_secorder.running.graph_backward import GraphBackward


class HookedForward(GraphBackward):
    """``with HookedForward(...) as run: outputs = run(inputs); samples = run.backward(loss)``.

    Args:
        table: the analyzed parameters.
        plan: how the model is captured.
        knowledge: what is known about the model already.
        options: what each pass collects.
        others: as for :class:`GraphBackward`.

    Attributes:
        random: whether the latest forward drew from the global random state.
    """

    def __init__(
        self, table: ParameterTable, plan: Plan, knowledge: ModelKnowledge, options: PassOptions, **others: Any
    ):
        self._frozen_codes = bool(table.quantized)
        super().__init__(
            *(table, plan, knowledge, options),
            locate_on_three_samples=self._locate_on_three_samples,
            attach_leaf=self._frozen_codes,
            only_library_calls=True,
            **others,
        )
        self._parameters = table
        self._records: list[tuple[Record, GradientEdge]] = []
        self._arguments: Any = None
        self.random = False

    def _detach(self) -> None:
        super()._detach()
        for record, _ in self._records:
            # The hooks of the graph, which may outlive this object, hold the records.
            record.inputs, record.kwargs = None, {}
        self._starts, self._sharing, self._leaves = [], set(), []
        self._arguments, self._records = None, []

    def __call__(self, inputs: Any) -> Any:
        """The model's outputs. ``inputs`` is one argument if a tensor, positional ones if a tuple, keyword ones if a mapping."""
        assert self.plan.model is not None
        self._arguments = inputs
        self._inputs = [x for x in tensors(inputs) if x.requires_grad]
        before, self._first_node = random_state(), next_sequence_number()
        with torch.enable_grad(), twice_differentiable(self._create_graph), numpy_of_frozen(self._parameters):
            outputs = call_model(self.plan.model, inputs)
        self.random = not all(map(torch.equal, before, random_state()))
        return outputs

    def _on_model_exit(self, forward: Forward, outputs: list[Tensor]) -> None:
        self._records += forward.records
        super()._on_model_exit(forward, outputs)

    def last_layer(self, outputs: Tensor) -> LastLayer | None:
        """The Linear layer that made these outputs, ``[n, ..., c]``; its inputs, ``[rows, i]``, have their graph.

        The result is None if no such layer did, if a parameter of it is used elsewhere, too, or if nothing comes before it. It
        is also None if hooks of the user's change the outputs' gradient, which passes from the layer's inputs would not see.
        """
        product = last_product(outputs)
        if product is None or has_others_hooks_on_gradient(outputs) or has_others_hooks_on_node(product):
            return None
        if self._create_graph or (factors := last_linear_factors(outputs)) is None or not factors[0].requires_grad:
            return None
        record = next((record for record, edge in self._records if edge.node in (outputs.grad_fn, product)), None)
        if record is None or type(record.site.module) is not nn.Linear or record.site.rule.function is not linear:
            return None
        alone = all(record.forward.calls[position] == 1 for position in record.site.positions)
        plain = record.placement == FIRST and record.placement.fits(outputs.shape, self.n)
        return LastLayer(*factors) if alone and plain and self._starts and not self._is_start(record) else None

    def _locate_on_three_samples(self) -> None:
        """Find where the samples are in a batch of only three of them, which costs far less than in the whole batch."""
        plan, n = self.plan, self.forwards.latest.n
        if n is None or n < 8:
            return
        assert plan.model is not None
        few = BatchSamples(n, plan.words).rows("inputs", self._arguments, [0, 1, 2])
        layers = replace(plan, sites=[site for site in plan.sites if site.rule is not None])
        self.forwards.active = False
        try:
            with (
                suppress(Exception),  # what three samples cannot show, the whole batch shows, or it is refused
                forked_random(self._parameters.tensors),
                hiding_changes(plan.model),
                restoring_state(plan.model),
                torch.enable_grad(),
                _Rehearsal(
                    *(self.table, layers, self._knowledge, PassOptions()),
                    attach_leaf=self._frozen_codes,
                    only_library_calls=True,
                    trust=Trust(numbers=not self._create_graph, first_axis=True, rehearsal=True),
                ),
                checked_on_host(self._parameters.tensors),
            ):
                call_model(plan.model, few)
        finally:
            self.forwards.active = True


class _Rehearsal(Recorder):
    """Records a forward only to find where its samples are; no backward pass through it counts."""

    def _pass_under_way(
        self, grads: Sequence[Tensor | None] = (), recomputed_in: int | None = None
    ) -> BackwardPass | None:
        return None


def require_twice_differentiable(results: Any, table: ParameterTable) -> None:
    """Raise if the graph of these tensors has a fused operation that can't be differentiated twice.

    Raises:
        UnsupportedError: naming the operation, the parameter nearest to it and the remedy.
    """
    if found := without_second_derivative(results, table):
        what, remedy = found
        raise UnsupportedError(f"create_graph: {what} has no second derivative; {remedy}")
