"""What one backward pass adds up to: captured calls in, squared norms of per-sample gradients out."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from torch_secorder.batch_axis.placement import Grouping
from torch_secorder.capture.records import Forward, Record
from torch_secorder.errors import (
    CoverageError,
    LifecycleError,
    ShapeError,
    SlowFallbackWarning,
    UnsupportedError,
)
from torch_secorder.graph.frontier import ParameterUse
from torch_secorder.model.parameters import ParameterTable
from torch_secorder.model.ranks import full_tensor, is_dtensor
from torch_secorder.per_sample import (
    Dense,
    PerSampleGradient,
    PulledBack,
    SharedFactor,
    SquareSum,
    at_least_float32,
    halving_on_oom,
    memory_limit,
    sign_vectors,
)
from torch_secorder.recording.batch import Block, all_norms, forms_of, squared_norms_of
from torch_secorder.recording.sample_norms import Output, Samples
from torch_secorder.recording.small_calls import SmallCallBatch
from torch_secorder.rules.node_rules import gradient_at, has_rule

# How exactly autograd's own gradient can be expected to be the sum of the captured ones: half precision rounds it, GPUs
# may multiply with few digits.
TOLERANCES = {(torch.float64, "cpu"): 1e-8, (torch.float32, "cpu"): 1e-4, (torch.float64, "cuda"): 1e-6}
HALF = (torch.float16, torch.bfloat16)
TOLERANCE, HALF_TOLERANCE = 1e-2, 5e-2  # elsewhere, and in half precision or under autocast


class Pass:
    """Collects one backward pass.

    A parameter's squared norm is taken as soon as its gradient arrives. Only if its module was called more than once, or
    is tied to another, does it wait for all uses, since the cross terms between uses belong to the trace.

    Args:
        table: the analysed parameters.
        diagonal: also add up squares entry by entry.
        repeated_calls: what two calls of the model that one backward pass reaches are: "same" or "new" samples.
        keep: leave the records' inputs alone, for another backward pass through the same forward.
        checks: also project the captured gradients on one direction each, to compare them with autograd's.
        gradients: also take the norms of whole gradients from their factors, where that is cheaper than reading them.
        max_memory: how many bytes the algebra may take for its temporaries at once.
    """

    def __init__(
        self,
        table: ParameterTable,
        *,
        diagonal: bool = False,
        repeated_calls: str | None = None,
        keep: bool = False,
        checks: bool = False,
        gradients: bool = False,
        max_memory: int | None = None,
    ):
        self._table, self._diagonal, self._repeated, self._keep = table, diagonal, repeated_calls, keep
        self.checks, self._max_memory = checks, max_memory
        self.half = False  # whether a gradient in half precision was seen
        self.slow: dict[
            str, int
        ] = {}  # rules that take one sample at a time -> elements of the gradients they went through
        self.seen = 0  # elements of all gradients
        self._blocks: dict[object, Block] = {}
        self._rules: dict[int, dict[str, None]] = defaultdict(dict)
        self._joins = not (checks or diagonal or repeated_calls is not None or max_memory is not None)
        self._gradients = gradients and repeated_calls is None and not checks and not table.ranks.distributed
        self.gradient_norms: dict[int, Tensor] = {}  # position -> ||gradient||, where its factors told
        self._inputs: dict[int, tuple[Any, int, dict[torch.Size, SharedFactor]]] = {}  # of several calls
        self._small = SmallCallBatch(self._rules, keep=keep)

    def unexplained(self, projections: Mapping[int, Tensor], samples: Samples) -> list[int]:
        """The parameters whose gradient, projected on a direction, is not what was captured of it.

        A gradient that autograd has and the captured calls have not comes from outside of the model's forward: a weight
        penalty in the loss, a use in compiled code. The tolerance is relative to ``sqrt(N sum_n ||g_n||^2)``, which bounds
        the sum of the gradients' norms, for each use of the parameter, with a hundredth of that of all parameters for
        gradients that are zero but for rounding.
        """
        if samples.skipped or not projections:
            return []
        wrong = []
        floor = 1e-2 * math.sqrt(float(samples.norms.double().sum()) * samples.batch)
        for position, actual in projections.items():
            found = [block.projections[position] for block in self._blocks.values() if position in block.projections]
            captured = sum(float(along) for along, _ in found)
            bound = sum(size for _, size in found) + floor
            tolerance = TOLERANCES.get((actual.dtype, actual.device.type), TOLERANCE)
            if not abs(captured - float(actual)) <= (HALF_TOLERANCE if self.half else tolerance) * bound:
                wrong.append(position)
        return wrong

    def warned(self) -> bool:
        """Warn if taking one sample at a time is most of the work; says whether it did."""
        if sum(self.slow.values()) <= self.seen:
            return False
        warnings.warn(
            f"most of the work is done by rules that take one sample at a time ({', '.join(sorted(self.slow))}); the numbers "
            "are exact, and torch_secorder.register_rule for the layer makes them cheaper",
            SlowFallbackWarning,
            stacklevel=2,
        )
        return True

    def __bool__(self) -> bool:
        """Whether anything was collected."""
        return bool(self._blocks)

    def add(self, record: Record, grad: Tensor) -> None:
        """The gradient of a recorded call's output has arrived."""
        grad = full_tensor(grad)
        self.half = self.half or grad.dtype in HALF
        self.seen += grad.numel()
        if not grad.numel():
            self._add_nothing(record, grad)
        elif not self._waits(record, grad):
            with memory_limit(self._max_memory):
                self._add(record, grad)

    def _add_nothing(self, record: Record, grad: Tensor) -> None:
        """A call without any position, an expert's that no token was sent to, say."""
        block = self._block(record.forward, record.forward.n or len(grad))
        for position in record.site.parameters.values():
            block.norms.setdefault(position, at_least_float32(grad.new_zeros(block.n)))
            self._rules[position][f"{record.site.rule.name} (empty)"] = None

    def _add(self, record: Record, grad: Tensor) -> None:
        forward, site = record.forward, record.site
        assert record.placement is not None
        call = record.call(grad, self._common(record))
        block = self._block(forward, forward.n or len(call.grad_output))
        if site.rule is None:
            assert record.moments is not None
            norms = Dense(call.grad_output.flatten(1)).squared_norm()
            block.outputs.setdefault(site.name, []).append(Output(norms, record.moments))
            return
        if not record.in_output_graph:
            raise CoverageError(
                f"{site}: the loss reaches it by another way than through what the model returns, so that nothing shows where "
                "its samples are: return what the loss is computed from, in tensors, mappings, sequences or dataclasses"
            )
        groups = record.placement.grouping(record.shape[record.placement.axis], block.n, grad.device)
        try:
            forms = forms_of(site, call)
        except ShapeError:
            if not (record.placement.is_one_sample or block.n == 1):
                raise
            # All of it belongs to one sample: the module was called for one at a time, without a batch axis.
            if groups is not None and groups.sample_index is not None:
                groups = replace(groups, sample_index=groups.sample_index[:1])
            forms = forms_of(site, record.shared_call(grad.reshape(1, *record.shape)))
        self._apply(block, record, forms, groups)
        if not self._keep:
            record.inputs = None

    def _common(self, record: Record) -> dict[torch.Size, SharedFactor] | None:
        """What this call has in common with those that got the same input; forgotten with the last of them."""
        if not record.inputs or record.packed or record.forward.recomputed_in is not None:
            return None
        x, takers = record.inputs[0], record.forward.takers.get(id(record.inputs[0]), 0)
        if takers < 2:
            return None
        # (The entry keeps the input, so that no other can get its id; takers may count some that had it before.)
        same, left, common = self._inputs.pop(id(x), (x, takers, {}))
        assert same is x
        if left > 1:
            self._inputs[id(x)] = x, left - 1, common
        return common

    def add_use(self, use: ParameterUse, node: Node | None, grads: tuple[Tensor | None, ...]) -> None:
        """The gradients of a frontier node's outputs have arrived."""
        with memory_limit(self._max_memory):
            self._add_use(use, node, grads)

    def _add_use(self, use: ParameterUse, node: Node | None, grads: tuple[Tensor | None, ...]) -> None:
        found = grads[use.output]
        if found is None and all(grad is None for grad in grads):
            return
        assert use.forward.n is not None
        if any(map(is_dtensor, (*grads, *self._leaves(use)))):
            raise UnsupportedError(
                f"{self._names(use)}: used outside of its module's own forward, where ranks compute parts of it: leave this "
                "parameter out of parallelize_module, or use it in its module's forward only"
            )
        block = self._block(use.forward, use.forward.n)
        self.half = self.half or any(grad is not None and grad.dtype in HALF for grad in grads)
        if found is None and block.n == 1:
            found = next(grad for grad in grads if grad is not None)  # all of it is that sample's
        elif found is None or not use.placement.fits(found.shape, block.n):
            shape = None if found is None else tuple(found.shape)
            raise ShapeError(f"{self._names(use)}: the {block.n} samples are not in a gradient of shape {shape}")
        self.seen += found.numel()
        memo: dict[str, Any] = {}
        for value in use.values:
            place = use.node_use(node, value, memo)
            form, rule = gradient_at(place, grads, use.output)
            if not has_rule(place):
                self.slow[rule] = self.slow.get(rule, 0) + block.n * found.numel()
            for target, batch_free_vjp in value.targets:
                carried = batch_free_vjp(form)
                if isinstance(target, int):
                    self._collect(block, use.forward, target, carried, rule)
                else:
                    shared = block.shared.get(target)
                    block.shared[target] = carried.dense() if shared is None else shared + carried.dense()

    def _waits(self, record: Record, grad: Tensor) -> bool:
        """Whether a small call, of parameters that have no other, can wait for others of its kind."""
        if not self._joins or not record.forward.inside or (kind := record.kind(grad)) is None:
            return False
        calls = record.forward.calls
        block = self._block(record.forward, record.forward.n or len(grad))
        for position in record.site.positions:
            if calls[position] > 1 or position in block.settled:
                return False
        block.settled.update(record.site.positions)
        self._small.add(kind, block, record, grad)
        return True

    def _apply(
        self, block: Block, record: Record, forms: Mapping[str, PerSampleGradient], groups: Grouping | None
    ) -> None:
        """The rule's answer for one call."""
        site, forward = record.site, record.forward
        for local, form in forms.items():
            grouped_by_sample = form if groups is None else form.grouped_by_sample(groups)
            position = site.parameters[local]
            if not forward.inside and self._repeated is None and (position in block.settled or position in block.held):
                raise LifecycleError(
                    f"{site} was called more than once outside of a call of the monitored model, which can mean one sample "
                    'seen twice or two batches: pass repeated_calls="same" or "new", or monitor the submodule'
                )
            self._collect(block, forward, position, grouped_by_sample, site.rule.name)

    def _collect(self, block: Block, forward: Forward, position: int, form: PerSampleGradient, rule: str) -> None:
        """Settle a parameter, or hold its gradient until all of its uses are there."""
        self._rules[position][f"{rule} ({form.algorithm})"] = None
        norms: Tensor | None = None
        if self.checks:
            left, right = sign_vectors(form.shape, form.like)
            along = halving_on_oom(form, lambda part: part.along(left, right), torch.add)
            before, size = block.projections.get(position, (torch.zeros_like(along), 0.0))
            # Uses of one parameter may cancel; rounding goes by the size of each.
            norms = squared_norms_of(form)
            own = math.sqrt(float(norms.double().sum()) * block.n)
            block.projections[position] = before + along, size + own
        if self._repeated == "same" or forward.calls[position] > 1:
            if isinstance(form, PulledBack) and form.permutation is None:
                form = Dense(form.dense())  # now, while the graph that carries it has its tensors
            held = block.held.get(position)
            block.held[position] = form if held is None else held + form
        elif position in block.settled:
            raise CoverageError(
                f"{self._table.rows[position].name}: its module was called again in the same backward pass, after its other "
                "calls had been counted (activation checkpointing of a shared module); use torch.utils.checkpoint with "
                "use_reentrant=False, or run this part without checkpointing"
            )
        else:
            self._settle(block, position, form, norms)
            if (
                self._gradients
                and forward.inside
                and not self.half
                and (norm := form.batch_gradient_norm()) is not None
            ):
                self.gradient_norms[position] = norm

    def _leaves(self, use: ParameterUse) -> list[Tensor]:
        targets = (target for value in use.values for target, _ in value.targets)
        return [self._table.leaves[target] for target in targets if isinstance(target, int)]

    def _names(self, use: ParameterUse) -> str:
        targets = (
            self._table.rows[t].name if isinstance(t, int) else str(t.site)
            for value in use.values
            for t, _ in value.targets
        )
        return ", ".join(targets)

    def finish(self, nonfinite: str = "raise") -> Samples:
        """Everything that the pass collected.

        Raises:
            NonFiniteError: if a gradient is not finite and ``nonfinite`` is "raise".
        """
        with memory_limit(self._max_memory):
            self._settle_all()
        blocks = list(self._blocks.values())
        reached, norms = all_norms(blocks, len(self._table))
        squares: dict[int, list[SquareSum]] = {}
        for block in blocks:
            for position, found in block.squares.items():
                squares.setdefault(position, []).append(found)
        outputs: dict[str, list[Output]] = {}
        for block in blocks:
            for name, calls in block.outputs.items():
                outputs.setdefault(name, []).extend(calls)
        self._table.ranks.require_same_norms(norms.sum(1), self._table.names)
        samples = Samples(norms.shape[1], norms, squares, reached, self._rules, outputs)
        return samples.finite(self._table.names, nonfinite)

    def _settle_all(self) -> None:
        """Whatever waited for the end of the pass."""
        for block in self._blocks.values():
            for record, grads in block.shared.items():
                self._apply(block, record, forms_of(record.site, record.shared_call(grads)), None)
            block.shared.clear()
            for position, form in block.held.items():
                self._settle(block, position, form)
            block.held.clear()
        self._small.finish()

    def _block(self, forward: Forward, n: int) -> Block:
        key: object = forward
        if self._repeated == "same" or forward.recomputed_in is not None:
            key = next(iter(self._blocks), forward)
        block, first = self._blocks.get(key), next(iter(self._blocks), None)
        if block is None and isinstance(first, Forward) and first.recomputed_in is not None:
            # Parts of this forward that a checkpoint ran again came before what it ran once.
            block = self._blocks[key] = self._blocks.pop(first)
        if block is None and self._blocks and self._repeated != "new":
            raise LifecycleError(
                "one backward pass reached two calls of the model, which can mean one sample seen twice or two batches: pass "
                'repeated_calls="same" if row n of both calls belongs to one sample, or "new" if they are different samples'
            )
        if block is None:
            block = self._blocks[key] = Block(n)
        if block.n != n:
            raise ShapeError(f"calls with {block.n} and with {n} samples in one backward pass: which is the batch?")
        return block

    def _settle(self, block: Block, position: int, form: PerSampleGradient, norms: Tensor | None = None) -> None:
        block.settled.add(position)
        norms = block.norms[position] = squared_norms_of(form) if norms is None else norms
        if self._diagonal:
            finite = norms.isfinite()
            if bool(finite.any()):
                part = form if bool(finite.all()) else form.select(finite.nonzero().squeeze(1))
                block.squares[position] = halving_on_oom(part, SquareSum.of, lambda a, b: SquareSum.summed([a, b]))
