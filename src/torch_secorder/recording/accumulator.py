"""What one backward pass adds up to: captured calls in, squared norms of per-sample gradients out."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from torch_secorder.autograd.double_precision import sum_in_double_precision
from torch_secorder.autograd.engine import current_node
from torch_secorder.autograd.precision import HALF, is_half
from torch_secorder.batch_axis.placement import Grouping
from torch_secorder.capture.records import Forward, Record
from torch_secorder.errors import (
    CoverageError,
    LifecycleError,
    ShapeError,
    SlowFallbackWarning,
    UnsupportedError,
    warn_at_users_line,
)
from torch_secorder.graph.frontier import IdleUse, ParameterUse
from torch_secorder.graph.refusals import unexpected
from torch_secorder.model.nested import whole
from torch_secorder.model.parameters import Table
from torch_secorder.model.ranks import is_dtensor
from torch_secorder.per_sample import (
    Dense,
    PerSampleGradient,
    PulledBack,
    SharedFactor,
    halving_on_oom,
    sign_vectors,
    squared_norms_of,
    zero_squared_norms,
)
from torch_secorder.recording.batch import SampleBatch, side_by_side
from torch_secorder.recording.doubts import Doubts
from torch_secorder.recording.gradient_norms import GradientNorms
from torch_secorder.recording.quantities import QUANTITIES, Part
from torch_secorder.recording.sample_norms import SampleNorms
from torch_secorder.recording.small_calls import SmallCallBatch
from torch_secorder.rules.node_rules import gradient_at, has_rule


@dataclass(frozen=True)
class PassOptions:
    """What the backward passes of a recorder collect, decided once for all of them.

    Attributes:
        quantities: what is taken besides squared norms: the name of a quantity -> what of it is kept, True for all.
        repeated_calls: what two calls of the model that one backward pass reaches are: "same" or "new" samples; None refuses.
        max_memory: how many bytes the algebra may take for its temporaries at once.
    """

    quantities: Mapping[str, Any] = field(default_factory=dict)
    repeated_calls: str | None = None
    max_memory: int | None = None

    @property
    def kind(self) -> Hashable:
        """The same for options with which passes are taken apart in the same way."""
        return *self.quantities, self.repeated_calls, self.max_memory


class PassAccumulator:
    """Collects one backward pass.

    A parameter's squared norm is taken as soon as its gradient arrives. Only if its module was called more than once, or
    is tied to another, does it wait for all uses, since the cross terms between uses belong to the trace.

    Args:
        table: the analyzed parameters.
        options: what is collected.
        keep_inputs: leave the records' inputs alone, for another backward pass through the same forward.
        checks: also project the captured gradients on one direction each, to compare them with autograd's.
        doubts: takes what may have cancelled, so that the pass's answers go to the host in one copy; None to ask at once, and
            to leave the answers where they are.
        gradients: takes the norms of whole gradients that factors tell for less than reading the gradient costs.

    Attributes:
        half: whether half precision takes part: a gradient has it, or autocast is on in the backward pass.
        is_empty: whether nothing was collected yet.
        parts: what the pass adds to other quantities, by their names.
        slow: rules that take one sample at a time -> elements of the gradients that went through them.
    """

    def __init__(
        self,
        table: Table,
        options: PassOptions,
        *,
        keep_inputs: bool = False,
        checks: bool = False,
        gradients: GradientNorms | None = None,
        doubts: Doubts | None = None,
    ):
        self._table, self._options, self._keep_inputs = table, options, keep_inputs
        self.checks, self.half, self.is_empty = checks, False, True
        self._batches: dict[object, SampleBatch] = {}
        self._rules: dict[int, dict[str, None]] = defaultdict(dict)
        self.parts: dict[str, Part] = {}
        self._of_forms: list[Part] = []
        for name, how in options.quantities.items():
            self.parts[name] = QUANTITIES[name].part(table.names, how)
            if QUANTITIES[name].takes_forms:
                self._of_forms.append(self.parts[name])
        alone = options.repeated_calls is None
        self._waits = alone and not (checks or self._of_forms or options.max_memory is not None)
        self._gradients = gradients if alone and not checks and not table.ranks.distributed else None
        # The id of an input -> the input, how many of its uses are left, and what they share.
        self._shared: dict[int, tuple[Any, int, dict[torch.Size, SharedFactor]]] = {}
        self._doubts = None if table.ranks.distributed else doubts
        self._small = SmallCallBatch(self._rules, keep_inputs=keep_inputs, doubts=self._doubts)
        self.slow: dict[str, int] = {}
        self._seen = 0  # elements of all gradients

    @property
    def projections(self) -> dict[int, list[tuple[Tensor, float]]]:
        """Position -> of each batch, the captured gradient along one direction, and a bound on what was added up."""
        found: dict[int, list[tuple[Tensor, float]]] = {}
        for batch in self._batches.values():
            for position, projection in batch.projections.items():
                found.setdefault(position, []).append(projection)
        return found

    def warned(self) -> bool:
        """Warn if taking one sample at a time is most of the work; says whether it did."""
        if sum(self.slow.values()) <= self._seen:
            return False
        warn_at_users_line(
            f"most of the work is done by rules that take one sample at a time ({', '.join(sorted(self.slow))}); the numbers "
            "are exact, and torch_secorder.register_rule for the layer makes them cheaper",
            SlowFallbackWarning,
        )
        return True

    # ------------------------------------------------------------------------------------------------ what arrives

    def add(self, record: Record, grad: Tensor) -> None:
        """The gradient of a recorded call's output has arrived."""
        grad = grad if type(grad) is Tensor else whole(grad)
        self.half = self.half or grad.dtype in HALF
        self._seen += grad.numel()
        if not grad.numel():
            self._add_empty(record, grad)
        elif record.site.rule is None:
            self._add_output(record, grad)
        elif not (self._waits and self._small.add(self._batch_of(record), record, grad)):
            self._add(record, grad)

    def _batch_of(self, record: Record) -> SampleBatch:
        """The batch of a call; its output's axis tells the number of samples where nothing else does."""
        n = record.forward.n
        if n is None:
            assert record.placement is not None
            n = record.shape[record.placement.axis]
        return self._batch(record.forward, n)

    def _add_empty(self, record: Record, grad: Tensor) -> None:
        """A call without any position, an expert's that no token was sent to, say."""
        batch = self._batch_of(record)
        for position in record.site.positions:
            batch.squared_norms.setdefault(position, zero_squared_norms(batch.n, grad))
            self._rules[position][f"{record.site.rule.name} (empty)"] = None

    def _add_output(self, record: Record, grad: Tensor) -> None:
        """A call of a module that is watched for its output only."""
        assert record.placement is not None
        by_sample = record.placement.fits(record.shape, self._batch_of(record).n)
        grad = record.call(grad).grad_output if by_sample else grad
        for part in self.parts.values():
            part.on_output(record, grad, by_sample)

    def _add(self, record: Record, grad: Tensor) -> None:
        site = record.site
        assert record.placement is not None
        call = record.call(grad, self._shared_factors(record))
        batch = self._batch_of(record)
        if not record.in_output_graph:
            raise CoverageError(
                f"{site}: the loss reaches it by another way than through what the model returns, so that nothing shows where "
                "its samples are: return what the loss is computed from, in tensors, mappings, sequences or dataclasses"
            )
        groups = record.placement.grouping(batch.n, grad.device)
        try:
            forms = site.forms(call)
        except ShapeError:
            if not (record.placement.is_one_sample or batch.n == 1):
                raise
            # All of it belongs to one sample: the module was called for one at a time, without a batch axis.
            if groups is not None and groups.sample_index is not None:
                groups = replace(groups, sample_index=groups.sample_index[:1], on_host=None)
            forms = site.forms(record.expanded_to_samples(grad.reshape(1, *record.shape)))
        self._apply(batch, record, forms, groups)
        if not self._keep_inputs:
            record.inputs = None

    def _shared_factors(self, record: Record) -> dict[torch.Size, SharedFactor] | None:
        """What this call has in common with those that got the same input; forgotten with the last of them."""
        if not record.inputs or record.inputs_packed or record.forward.recomputed_in is not None:
            return None
        x, uses = record.inputs[0], record.forward.input_uses.get(id(record.inputs[0]), 0)
        if uses < 2:
            return None
        # The entry keeps the input, so that no other tensor can get its id; the count may include some that had it before.
        same, left, factors = self._shared.pop(id(x), (x, uses, {}))
        assert same is x
        if left > 1:
            self._shared[id(x)] = x, left - 1, factors
        return factors

    def add_use(self, use: ParameterUse, node: Node | None, grads: tuple[Tensor | None, ...]) -> None:
        """The gradients of a frontier node's outputs have arrived."""
        found = grads[use.output]
        if found is None and all(grad is None for grad in grads):
            return
        assert use.forward.n is not None
        if any(map(is_dtensor, (*grads, *self._leaves(use)))):
            raise UnsupportedError(
                f"{self._names(use)}: used outside of its module's own forward, where ranks compute parts of it: leave this "
                "parameter out of parallelize_module, or use it in its module's forward only"
            )
        batch = self._batch(use.forward, use.forward.n)
        self.half = self.half or any(grad is not None and is_half(grad) for grad in grads)
        if found is None and batch.n == 1:
            found = next(grad for grad in grads if grad is not None)  # All of it belongs to the one sample.
        elif found is None or not (batch.n == 1 or use.placement.fits(found.shape, batch.n)):
            shape = None if found is None else tuple(found.shape)
            raise ShapeError(f"{self._names(use)}: the {batch.n} samples are not in a gradient of shape {shape}")
        self._seen += found.numel()
        memo: dict[str, Any] = {}
        for value in use.values:
            place = use.node_use(node, value, memo)
            form, rule = gradient_at(place, grads, use.output)
            if not has_rule(place):
                self.slow[rule] = self.slow.get(rule, 0) + batch.n * found.numel()
            for target, batch_free_vjp in value.targets:
                self._add_to_target(batch, use.forward, target, batch_free_vjp(form), rule)

    def _add_to_target(
        self, batch: SampleBatch, forward: Forward, target: int | Record, form: PerSampleGradient, rule: str
    ) -> None:
        """The gradient of what a batch-free value was computed from: a parameter, or a call without a batch axis."""
        if isinstance(target, int):
            self._collect(batch, forward, target, form, rule)
        else:
            before = batch.shared.get(target)
            batch.shared[target] = form.dense() if before is None else before + form.dense()

    def add_idle(self, seen: Record | IdleUse, grads: Sequence[Tensor | None]) -> None:
        """Gradients have arrived where none are expected: they have to be zero."""
        targets = [seen] if isinstance(seen, Record) else seen.targets
        positions = [p for target in targets for p in ([target] if isinstance(target, int) else target.site.positions)]
        assert seen.idle is not None
        assert seen.forward.n is not None
        there = [grad for grad in grads if grad is not None]
        if any(bool(whole(grad).any()) for grad in there):
            seen.idle.forget()
            raise unexpected([self._table.names[position] for position in positions], seen.idle.why, seen.forward.n)
        batch = self._batch(seen.forward, seen.forward.n)
        for position in positions:
            batch.squared_norms.setdefault(position, zero_squared_norms(batch.n, there[0]))
            self._rules[position]["none (zero gradient)"] = None

    # ------------------------------------------------------------------------------------------------ one parameter

    def _apply(
        self, batch: SampleBatch, record: Record, forms: Mapping[str, PerSampleGradient], groups: Grouping | None
    ) -> None:
        """The rule's answer for one call."""
        site, forward = record.site, record.forward
        for local, form in forms.items():
            form = form if groups is None else form.grouped_by_sample(groups)
            position = site.parameters[local]
            twice = position in batch.settled or position in batch.held
            if twice and not forward.in_model_call and self._options.repeated_calls != "same":
                # Nothing shows which calls of parts belong together, so that other samples can't be told from the same.
                raise LifecycleError(
                    f"{site} was called more than once outside of a call of the monitored model, which can mean one sample "
                    'seen twice or two batches: pass repeated_calls="same" if row n of both calls belongs to one sample; if they '
                    'are different samples, monitor the submodule that is called, with repeated_calls="new"'
                )
            self._collect(batch, forward, position, form, site.rule.name)

    def _collect(self, batch: SampleBatch, forward: Forward, position: int, form: PerSampleGradient, rule: str) -> None:
        """Settle a parameter, or hold its gradient until all of its uses are there."""
        self._rules[position][f"{rule} ({form.algorithm})"] = None
        norms = self._project(batch, position, form) if self.checks else None
        if self._options.repeated_calls == "same" or forward.calls[position] > 1:
            if isinstance(form, PulledBack) and form.permutation is None:
                form = Dense(form.dense())  # The graph that it is pulled back through has its tensors now.
            held = batch.held.get(position)
            batch.held[position] = form if held is None else held + form
        elif position in batch.settled:
            raise CoverageError(
                f"{self._table.rows[position].name}: its module was called again in the same backward pass, after its other "
                "calls had been counted (activation checkpointing of a shared module); use torch.utils.checkpoint with "
                "use_reentrant=False, or run this part without checkpointing"
            )
        else:
            self._settle(batch, position, form, norms)
            gradients = self._gradients if forward.in_model_call and not self.half else None
            if gradients is not None and (norm := form.batch_gradient_norm()) is not None:
                gradients.expect(position, norm, current_node(), self._table.leaves[position])

    def _project(self, batch: SampleBatch, position: int, form: PerSampleGradient) -> Tensor:
        """Note the captured gradient along one direction, for a check of the sums; returns the squared norms."""
        left, right = sign_vectors(form.shape, form.like)
        along = halving_on_oom(form, lambda part: part.along(left, right), torch.add)
        before, size = batch.projections.get(position, (torch.zeros_like(along), 0.0))
        norms = squared_norms_of(form)
        # Uses of one parameter may cancel; rounding goes by the size of each.
        own = math.sqrt(float(sum_in_double_precision(norms)) * batch.n)
        batch.projections[position] = before + along, size + own
        return norms

    def _settle(self, batch: SampleBatch, position: int, form: PerSampleGradient, norms: Tensor | None = None) -> None:
        batch.settled.add(position)
        if norms is None:
            shown = (part.squared_norms(position, form) for part in self._of_forms)
            norms = next((squares for squares in shown if squares is not None), None)
        norms = self._squared_norms([batch], [position], form) if norms is None else norms
        batch.squared_norms[position] = norms
        for part in self._of_forms:
            part.on_form(position, form, norms)

    def _squared_norms(
        self, batches: Sequence[SampleBatch], positions: Sequence[int], form: PerSampleGradient
    ) -> Tensor:
        if self._doubts is None:
            return squared_norms_of(form)
        return self._doubts.squared_norms(batches, positions, form)

    def _leaves(self, use: ParameterUse) -> list[Tensor]:
        targets = [target for value in use.values for target, _ in value.targets]
        return [self._table.leaves[target] for target in targets if isinstance(target, int)]

    def _names(self, use: ParameterUse) -> str:
        targets = [target for value in use.values for target, _ in value.targets]
        return ", ".join(self._table.rows[t].name if isinstance(t, int) else str(t.site) for t in targets)

    # ------------------------------------------------------------------------------------------------ batches

    def _batch(self, forward: Forward, n: int) -> SampleBatch:
        """The batch that a forward's samples belong to."""
        key: object = forward
        if self._options.repeated_calls == "same" or forward.recomputed_in is not None:
            key = next(iter(self._batches), forward)
        batch = self._batches.get(key)
        if batch is None:
            batch = self._batches[key] = self._new_batch(n)
            self.is_empty = False
        if batch.n != n:
            raise ShapeError(f"calls with {batch.n} and with {n} samples in one backward pass: which is the batch?")
        return batch

    def _new_batch(self, n: int) -> SampleBatch:
        first = next(iter(self._batches), None)
        if isinstance(first, Forward) and first.recomputed_in is not None:
            # Parts of this forward that a checkpoint ran again came before what it ran once.
            return self._batches.pop(first)
        if first is not None and self._options.repeated_calls != "new":
            raise LifecycleError(
                "one backward pass reached two calls of the model, which can mean one sample seen twice or two batches: pass "
                'repeated_calls="same" if row n of both calls belongs to one sample, or "new" if they are different samples'
            )
        return SampleBatch(n)

    def finish(self, nonfinite: str = "raise", gradient_norms: Tensor | None = None) -> SampleNorms:
        """Everything that the pass collected.

        Args:
            nonfinite: "skip" or "raise".
            gradient_norms: of the parameters' gradients, which are brought to the host together with the answers.

        Raises:
            NonFiniteError: if a gradient is not finite and ``nonfinite`` is "raise".
        """
        for batch in self._batches.values():
            if batch.shared or batch.held:
                self._settle_waiting(batch)
        self._small.finish()
        batches = list(self._batches.values())
        stacked = [batch.stacked() for batch in batches]
        reached = {position for positions, _ in stacked for position in positions}
        if self._doubts is not None:
            stacked, gradient_norms = self._on_host(self._doubts, stacked, gradient_norms)
        norms = side_by_side(stacked, len(self._table.rows))
        if self._doubts is not None:
            ends = list(itertools.accumulate(batch.n for batch in batches))
            columns = {batch: slice(end - batch.n, end) for batch, end in zip(batches, ends, strict=True)}
            self._doubts.recompute(norms, columns)
        if self._table.ranks.distributed:
            self._table.ranks.require_same_norms(norms, self._table.names)
        samples = SampleNorms(norms.shape[1], norms, reached, self._rules, self.parts, gradient_norms=gradient_norms)
        return samples.finite(self._table.names, nonfinite)

    def _on_host(
        self, doubts: Doubts, stacked: list[tuple[list[int], Tensor]], gradient_norms: Tensor | None
    ) -> tuple[list[tuple[list[int], Tensor]], Tensor | None]:
        """Squared norms and the norms of gradients in float64 on the host, where everything else happens; and what parts need."""
        norms = [] if gradient_norms is None else [gradient_norms]
        read = {name: part.tensors() for name, part in self.parts.items()}
        found = iter(doubts.answered([*(values for _, values in stacked), *norms, *itertools.chain(*read.values())]))
        stacked = [(positions, next(found)) for positions, _ in stacked]
        gradient_norms = next(found) if norms else None
        for name, tensors in read.items():
            self.parts[name] = self.parts[name].with_tensors(itertools.islice(found, len(tensors)))
        return stacked, gradient_norms

    def _settle_waiting(self, batch: SampleBatch) -> None:
        """Take the norms of the gradients that waited for the end of the pass."""
        for record, grads in batch.shared.items():
            if record.site.rule is None:
                for part in self.parts.values():
                    part.on_output(record, grads, True)
                continue
            self._apply(batch, record, record.site.forms(record.expanded_to_samples(grads)), None)
        batch.shared.clear()
        for position, form in batch.held.items():
            self._settle(batch, position, form)
        batch.held.clear()
