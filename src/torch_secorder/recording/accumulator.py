"""What one backward pass adds up to: captured calls in, squared norms of per-sample gradients out."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from torch_secorder.autograd.precision import HALF, is_half
from torch_secorder.batch_axis.placement import Grouping, Layout
from torch_secorder.capture.model_run import Forward
from torch_secorder.capture.records import Record
from torch_secorder.errors import (
    CoverageError,
    LifecycleError,
    ShapeError,
)
from torch_secorder.graph.chain import pulled_back
from torch_secorder.graph.refusals import silent_use, unexpected
from torch_secorder.graph.uses import BatchFreeValue, IdleUse, ParameterUse
from torch_secorder.model.nested import whole
from torch_secorder.model.parameters import Table
from torch_secorder.per_sample import Dense, PerSampleGradient, zero_squared_norms
from torch_secorder.recording.batch import Projection, SampleBatch, side_by_side
from torch_secorder.recording.doubts import Doubts, on_the_host
from torch_secorder.recording.gradient_norms import GradientNorms
from torch_secorder.recording.options import PassOptions
from torch_secorder.recording.parameter_norms import ParameterNorms
from torch_secorder.recording.quantities import QUANTITIES, Part
from torch_secorder.recording.sample_norms import SampleNorms
from torch_secorder.recording.shared_inputs import SharedInputs
from torch_secorder.recording.slow_rules import SlowRules
from torch_secorder.recording.small_calls import SmallCallBatch
from torch_secorder.recording.use_gradients import gradient_with_samples, require_whole
from torch_secorder.recording.waiting_values import WaitingValue, add_up
from torch_secorder.rules.node_rules import gradient_at


class PassAccumulator:
    """Collects one backward pass.

    A parameter's squared norm is taken as soon as its gradient arrives. Only if its module was called more than once, or
    is tied to another, does it wait for all uses, since the cross terms between uses belong to the trace.

    Args:
        table: the analyzed parameters.
        options: what is collected.
        keep_inputs: whether the records keep their inputs, for another backward pass through the same forward.
        checks: whether captured gradients are also projected on one direction each, to be compared with autograd's.
        doubts: keeps what may have cancelled, so that the pass's results go to the host in one copy. With None, cancellation
            is looked for at once, and the results stay on their device.
        gradients: takes the norms of whole gradients where the factors give them for less than reading the gradient costs.
        half: whether autograd rounds its own gradients, as in autocast, also those that it returns in float32.

    Attributes:
        checks: whether captured gradients are compared with autograd's.
        is_empty: whether nothing was collected yet.
        parts: what the pass adds to other quantities, by their names.
        slow: how much of the work is done by rules that take one sample at a time.
        waiting: the keys of values whose gradients wait for those of other nodes that take them, each with their sum so far.
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
        half: bool = False,
    ):
        self._table, self._options, self._keep_inputs = table, options, keep_inputs
        self.checks, self.is_empty = checks, True
        self._batches: dict[object, SampleBatch] = {}
        self._rules: dict[int, dict[str, None]] = defaultdict(dict)
        self.parts: dict[str, Part] = {}
        of_forms: list[Part] = []
        for name, how in options.quantities.items():
            self.parts[name] = QUANTITIES[name].part(table.names, how)
            if QUANTITIES[name].takes_forms:
                of_forms.append(self.parts[name])
        alone = options.repeated_calls is None
        self._waits = alone and not (checks or of_forms or options.max_memory is not None)
        self._doubts = None if table.ranks.distributed else doubts
        told = gradients if alone and not checks and not table.ranks.distributed else None
        self._norms = ParameterNorms(
            *(table, options, self._rules, self.parts, of_forms, checks, told, self._doubts, half)
        )
        self._shared = SharedInputs()
        self._small = SmallCallBatch(self._rules, keep_inputs=keep_inputs, doubts=self._doubts)
        self.slow = SlowRules()
        self.waiting: dict[object, WaitingValue] = {}

    @property
    def half(self) -> bool:
        """Whether half precision takes part: a gradient has it, or autocast is on in the backward pass."""
        return self._norms.half

    @property
    def projections(self) -> dict[int, list[Projection]]:
        """Position -> of each batch, the captured gradient along one direction."""
        found: dict[int, list[Projection]] = {}
        for batch in self._batches.values():
            for position, projection in batch.projections.items():
                found.setdefault(position, []).append(projection)
        return found

    # ------------------------------------------------------------------------------------------------ what arrives

    def add(self, record: Record, grad: Tensor) -> None:
        """The gradient of a recorded call's output has arrived."""
        grad = grad if type(grad) is Tensor else whole(grad)
        self._norms.half = self._norms.half or grad.dtype in HALF
        self.slow.seen += grad.numel()
        if not grad.numel():
            self._add_empty(record, grad)
        elif record.site.rule is None:
            self._add_output(record, grad)
        elif not (self._waits and self._small.add(self._batch_of(record), record, grad)):
            self._add(record, grad)

    def _batch_of(self, record: Record) -> SampleBatch:
        """The batch of a call. Where nothing else tells the number of samples, the length of its output's batch axis does."""
        n = record.forward.n
        if n is None:
            assert record.placement is not None
            n = record.shape[record.placement.axis]
        return self._batch(record.forward, n)

    def _add_empty(self, record: Record, grad: Tensor) -> None:
        """Add a call without any position, such as that of an expert that no token was sent to."""
        batch = self._batch_of(record)
        for position in record.site.positions:
            batch.squared_norms.setdefault(position, zero_squared_norms(batch.n, grad))
            self._rules[position][f"{record.site.rule.name} (empty)"] = None

    def _add_output(self, record: Record, grad: Tensor) -> None:
        """Add a call of a module that is watched for its output only."""
        assert record.placement is not None
        by_sample = record.placement.fits(record.shape, self._batch_of(record).n)
        grad = record.call(grad).grad_output if by_sample else grad
        for part in self.parts.values():
            part.on_output(record, grad, by_sample)

    def _add(self, record: Record, grad: Tensor) -> None:
        site = record.site
        assert record.placement is not None
        call = record.call(grad, self._shared.factors_of(record))
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
            sample = record.placement.only_sample(grad.reshape(record.shape), batch.n)
            if sample is None:
                raise
            # The whole call belongs to one sample: the module was called for one sample at a time, without a batch axis.
            groups = Grouping(batch.n, Layout.INDEXED, sample)
            forms = site.forms(record.expanded_to_samples(grad.reshape(1, *record.shape)))
        self._norms.add(batch, record, forms, groups)
        if not self._keep_inputs:
            record.inputs = None

    def add_use(self, use: ParameterUse, node: Node | None, grads: tuple[Tensor | None, ...]) -> None:
        """The gradients of a frontier node's outputs have arrived."""
        if all(grad is None for grad in grads):
            return
        assert use.forward.n is not None
        require_whole(use, grads, self._table)
        batch = self._batch(use.forward, use.forward.n)
        self._norms.half = self._norms.half or any(grad is not None and is_half(grad) for grad in grads)
        found = gradient_with_samples(use, grads, batch.n, self._table)
        self.slow.seen += found.numel()
        memo: dict[str, Any] = {}
        for used in use.values:
            place, value = use.node_use(node, used, memo), used.value
            form, rule, at_once = gradient_at(place, grads, use.output)
            if not at_once:
                self.slow.add(rule, batch.n * found.numel())
            # The sizes of all uses bound the rounding of the sums that are checked.
            if self.checks or not value.is_added_up:
                self._add_value(batch, use.forward, value, form, rule)
                continue
            add_up(self.waiting, batch, use, value, form, rule)
            for position in value.positions:
                self._rules[position][f"{rule} ({Dense.algorithm})"] = None

    def add_waiting_value(self, key: object) -> None:
        """No more gradients come for a value that several nodes take."""
        found = self.waiting.pop(key)
        self._add_value(found.batch, found.use.forward, found.value, found.form, found.rule)

    def _add_value(
        self, batch: SampleBatch, forward: Forward, value: BatchFreeValue, form: PerSampleGradient, rule: str
    ) -> None:
        """Add the gradient of a batch-free value to everything that it was computed from."""
        for (target, _), pulled in zip(value.targets, pulled_back(form, value.chains), strict=True):
            self._add_to_target(batch, forward, target, pulled, rule)

    def _add_to_target(
        self, batch: SampleBatch, forward: Forward, target: int | Record, form: PerSampleGradient, rule: str
    ) -> None:
        """Add the gradient of what a batch-free value was computed from: a parameter, or a call without a batch axis."""
        if isinstance(target, int):
            self._norms.collect(batch, forward, target, form, rule)
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
            raise unexpected([self._table.names[position] for position in positions], seen.idle.why, seen.forward.count)
        batch = self._batch(seen.forward, seen.forward.n)
        if torch.is_grad_enabled() and any(grad.numel() for grad in there):
            batch.silent.update(positions)
        for position in positions:
            batch.squared_norms.setdefault(position, zero_squared_norms(batch.n, there[0]))
            self._rules[position]["none (zero gradient)"] = None

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
            # The parts of this forward that a checkpoint ran again came before the parts that ran once.
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
            gradient_norms: the norms of the parameters' gradients, which go to the host together with the results.

        Raises:
            NonFiniteError: if a gradient is not finite and ``nonfinite`` is "raise".
        """
        for key in list(self.waiting):  # Nothing told that no more would come, as in a pass for other gradients.
            self.add_waiting_value(key)
        for batch in self._batches.values():
            used = {*batch.settled, *batch.held}.union(*(record.site.positions for record in batch.shared))
            if lost := batch.silent & used:
                raise silent_use([self._table.names[position] for position in sorted(lost)])
            if batch.shared or batch.held:
                self._norms.settle_waiting(batch)
        self._small.finish()
        batches = list(self._batches.values())
        stacked = list(map(SampleBatch.stacked, batches))
        if self._doubts is not None:
            stacked, gradient_norms = on_the_host(self._doubts, self.parts, stacked, gradient_norms)
        norms = side_by_side(stacked, len(self._table.rows))
        if self._doubts is not None:
            ends = list(itertools.accumulate(batch.n for batch in batches))
            columns = {batch: slice(end - batch.n, end) for batch, end in zip(batches, ends, strict=True)}
            self._doubts.recompute(norms, columns)
        if self._table.ranks.distributed:
            self._table.ranks.require_same_norms(norms, self._table.names)
        reached = set(itertools.chain.from_iterable(map(itemgetter(0), stacked)))
        samples = SampleNorms(norms.shape[1], norms, reached, self._rules, self.parts, gradient_norms=gradient_norms)
        return samples.finite(self._table.names, nonfinite)
