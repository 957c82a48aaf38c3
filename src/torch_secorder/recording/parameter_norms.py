"""From the per-sample gradients of one parameter's uses to their squared norms: at once, or when all of its uses are there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_secorder.autograd.double_precision import sum_in_double_precision
from torch_secorder.autograd.engine import current_node
from torch_secorder.batch_axis.placement import Grouping
from torch_secorder.capture.model_run import Forward
from torch_secorder.capture.records import Record
from torch_secorder.errors import CoverageError, LifecycleError
from torch_secorder.model.parameters import Table
from torch_secorder.per_sample import (
    Dense,
    PerSampleGradient,
    PulledBack,
    halving_on_oom,
    sign_vectors,
    squared_norms_of,
)
from torch_secorder.recording.batch import Projection, SampleBatch
from torch_secorder.recording.doubts import Doubts
from torch_secorder.recording.gradient_norms import GradientNorms
from torch_secorder.recording.options import PassOptions
from torch_secorder.recording.quantities import Part


@dataclass(eq=False)
class ParameterNorms:
    """Settles the parameters that one backward pass reaches.

    Attributes:
        table: the analyzed parameters.
        options: what is collected.
        rules: position -> how its numbers were computed; this adds to it.
        parts: what the pass adds to other quantities, by their names.
        of_forms: the parts that take per-sample gradients.
        checks: whether captured gradients are also projected on one direction each, to be compared with autograd's.
        gradients: takes the norms of whole gradients where the factors give them for less than reading the gradient costs.
        doubts: keeps what may have cancelled; with None, cancellation is looked for at once.
        half: whether half precision takes part: a gradient has it, or autocast is on in the backward pass.
    """

    table: Table
    options: PassOptions
    rules: dict[int, dict[str, None]]
    parts: dict[str, Part]
    of_forms: Sequence[Part]
    checks: bool
    gradients: GradientNorms | None
    doubts: Doubts | None
    half: bool

    def add(
        self, batch: SampleBatch, record: Record, forms: Mapping[str, PerSampleGradient], groups: Grouping | None
    ) -> None:
        """Add the rule's answer for one call.

        Raises:
            LifecycleError: if nothing shows whether the call has the same samples as another one.
        """
        site, forward = record.site, record.forward
        for local, form in forms.items():
            form = form if groups is None else form.grouped_by_sample(groups)
            position = site.parameters[local]
            twice = position in batch.settled or position in batch.held
            if twice and not forward.in_model_call and self.options.repeated_calls != "same":
                # Nothing shows which calls of submodules belong together: their samples may be the same or others.
                raise LifecycleError(
                    f"{site} was called more than once outside of a call of the monitored model, which can mean one sample "
                    'seen twice or two batches: pass repeated_calls="same" if row n of both calls belongs to one sample; if they '
                    'are different samples, monitor the submodule that is called, with repeated_calls="new"'
                )
            self.collect(batch, forward, position, form, site.rule.name)

    def collect(self, batch: SampleBatch, forward: Forward, position: int, form: PerSampleGradient, rule: str) -> None:
        """Settle a parameter, or hold its gradient until all of its uses are there."""
        self.rules[position][f"{rule} ({form.algorithm})"] = None
        norms = self._project(batch, position, form) if self.checks else None
        if self.options.repeated_calls == "same" or forward.calls[position] > 1:
            if isinstance(form, PulledBack) and form.permutation is None:
                form = Dense(form.dense())  # The graph that it is pulled back through may be freed later.
            held = batch.held.get(position)
            batch.held[position] = form if held is None else held + form
        elif position in batch.settled:
            raise CoverageError(
                f"{self.table.rows[position].name}: its module was called again in the same backward pass, after its other "
                "calls had been counted (activation checkpointing of a shared module); use torch.utils.checkpoint with "
                "use_reentrant=False, or run this part without checkpointing"
            )
        else:
            self._settle(batch, position, form, norms)
            gradients = self.gradients if forward.in_model_call and not self.half else None
            if gradients is not None and (norm := form.batch_gradient_norm()) is not None:
                gradients.expect(position, norm, current_node(), self.table.leaves[position])

    def _project(self, batch: SampleBatch, position: int, form: PerSampleGradient) -> Tensor:
        """Note the captured gradient along one direction, for a check of the sums; returns the squared norms."""
        left, right = sign_vectors(form.shape, form.like)
        along = halving_on_oom(form, lambda part: part.along(left, right), torch.add)
        norms = squared_norms_of(form)
        found = Projection(along, math.sqrt(float(sum_in_double_precision(norms)) * batch.n), form.dtype)
        before = batch.projections.get(position)
        batch.projections[position] = found if before is None else before.plus(found)
        return norms

    def _settle(self, batch: SampleBatch, position: int, form: PerSampleGradient, norms: Tensor | None = None) -> None:
        batch.settled.add(position)
        if norms is None and self.of_forms:
            shown = (part.squared_norms(position, form) for part in self.of_forms)
            norms = next((squares for squares in shown if squares is not None), None)
        if norms is None:
            doubts = self.doubts
            norms = squared_norms_of(form) if doubts is None else doubts.squared_norms([batch], [position], form)
        batch.squared_norms[position] = norms
        for part in self.of_forms:
            part.on_form(position, form, norms)

    def settle_waiting(self, batch: SampleBatch) -> None:
        """Take the norms of the gradients that waited for the end of the pass."""
        for record, grads in batch.shared.items():
            if record.site.rule is None:
                for part in self.parts.values():
                    part.on_output(record, grads, True)
                continue
            self.add(batch, record, record.site.forms(record.expanded_to_samples(grads)), None)
        batch.shared.clear()
        for position, form in batch.held.items():
            self._settle(batch, position, form)
        batch.held.clear()
