"""The runs of the model, and which of them each call of a module belongs to.

A module is called in a run of the model in the same thread, or in a backward pass, where a checkpoint runs a part of the model
again, or by the user on its own.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from torch_secorder.autograd.compiled import never_compiled
from torch_secorder.autograd.engine import (
    LIBRARY_PASSES,
    LIBRARY_THREADS,
    LOOKS,
    calling_thread,
    current_graph_task,
    forward_mode_level,
    in_library_call,
    innermost_transform,
)
from torch_secorder.batch_axis.count import Count, Seen, counted, empty_batch
from torch_secorder.batch_axis.of_parameters import without_those_of_parameters
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.batch_axis.samples import BatchSamples, some_has_samples
from torch_secorder.batch_axis.told import Told
from torch_secorder.capture.earlier_runs import EarlierRuns
from torch_secorder.capture.model_run import Forward
from torch_secorder.errors import CurvatureError
from torch_secorder.model.containers import keyed_tensors, tensors

if TYPE_CHECKING:
    from torch_secorder.capture.records import Record


class ForwardTracker:
    """Follows the runs of one model through the hooks before and after its call.

    Args:
        words: where the user says that the samples are.
        every: record every k-th call of the model, beginning with the first; calls without gradients don't count.
        only_library_calls: record calls that this library makes in this thread, instead of the user's.
        follows_runs: whether a run may take what an earlier one has computed for the same samples.
        on_recomputation: called when a backward pass runs a forward again (activation checkpointing), with the number of that
            pass and the number of the pass that it is nested in, which is its own if there is none.
        on_refusal: called with the error if a forward in a backward pass can't be recorded, since that pass must not be broken
            off. Without it the error is raised.
        on_exit: called at the end of each recorded run with the run and the tensors among the model's outputs.
        on_empty: called at the end of a run without samples, which is not recorded, with the tensors among its outputs; without
            it such a run is refused.

    Attributes:
        active: whether calls are recorded at all.
        every: every k-th call of the model is recorded.
        latest: the latest complete run of the model.
        outside_calls: the calls of modules outside of any run of the model that may be of the same samples as the next such
            call; None once a backward pass has counted them.
        skipped_passes: the backward passes that reached a run which was not recorded.
    """

    def __init__(
        self,
        words: Told,
        *,
        every: int = 1,
        only_library_calls: bool = False,
        follows_runs: bool = False,
        on_recomputation: Callable[[int, int], object] | None = None,
        on_refusal: Callable[[Exception], object] | None = None,
        on_exit: Callable[[Forward, list[Tensor]], object],
        on_empty: Callable[[list[Tensor]], object] | None = None,
    ):
        self.words, self.every, self._calls = words, every, 0
        self._thread = get_ident() if only_library_calls else None
        self._on_recomputation, self._on_refusal, self._on_exit = on_recomputation, on_refusal, on_exit
        self._on_empty = on_empty
        self._earlier = EarlierRuns() if follows_runs else None
        self._running: dict[int, Forward] = {}  # thread -> its run of the model; several threads may train one model
        self._skipping: set[int] = set()  # threads whose run of the model is not recorded
        self._noting: dict[
            int, list[tuple[Record, GradientEdge]]
        ] = {}  # thread -> the calls that somebody wants to know
        self.outside_calls: Forward | None = None
        self.skipped_passes: set[int] = set()
        self.latest = Forward()
        self.active = False

    def records_calls(self) -> bool:
        """Whether a call made now, in this thread, is one to record."""
        if not self.active:
            return False
        if self._thread is not None:  # A loss may call the model, too.
            return self._thread == calling_thread() and self._thread in LIBRARY_THREADS
        # A call under a transform of torch.func has gradients of its own. If parameters take part in it, the graph shows them.
        if _is_transformed():
            return False
        return not (LIBRARY_THREADS or LIBRARY_PASSES) or not in_library_call()

    @never_compiled
    def on_model_enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Called before the model runs: a run begins, or the call is passed over."""
        if not self.records_calls():
            return
        task, thread = current_graph_task(), get_ident()
        if task == -1:
            if self.outside_calls is not None and self.outside_calls.recomputed_in is not None:
                self.outside_calls = None  # The backward pass that ran these calls again was broken off.
            self.skipped_passes.clear()
        if task in self.skipped_passes if task != -1 else self._passes_over():
            self._skipping.add(thread)
            return
        self._skipping.discard(thread)
        try:
            count = counted(self.words, args, kwargs)
            if count.n == 0 and self._on_empty is None:
                raise empty_batch(count)
        except CurvatureError as error:
            self.refuse(error)
            return
        recomputed_in = None if task == -1 else self._recomputation(task)
        forward = self._running[thread] = Forward(count.n, recomputed_in=recomputed_in, count=count)
        if self._earlier is not None and recomputed_in is None:
            self._earlier.begin()
            forward.earlier = self._earlier
        if count.n is not None and recomputed_in is None:
            forward.inputs = count.inputs(args, kwargs)
            if type(count.why) is Seen and count.why.inside is None and count.why.axis == 0:
                key = count.why.key
                value = args[key] if isinstance(key, int) else kwargs[key]
                forward.counting = weakref.ref(value) if isinstance(value, Tensor) else forward.counting

    def _passes_over(self) -> bool:
        """Count a call of the model; returns whether it is passed over, since only every k-th call is recorded.

        A call without gradients, such as an evaluation between two steps, leads to no backward pass and doesn't count.
        """
        if not torch.is_grad_enabled():
            return False
        self._calls += 1
        return (self._calls - 1) % self.every != 0

    @never_compiled
    def on_model_exit(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Called after the model has returned, or raised an error; the output is None then."""
        if not self.records_calls():
            return
        thread = get_ident()
        forward = self._running.pop(thread, None)
        outputs = [output] if isinstance(output, Tensor) else tensors(output)
        if thread in self._skipping:
            self._skipping.discard(thread)
            for node in {x.grad_fn for x in outputs if x.grad_fn is not None}:
                node.register_prehook(self._note_skipped_pass)
        if forward is None:
            return
        self.latest = forward
        try:
            if output is not None and forward.recomputed_in is None:
                if forward.n == 0:
                    self._leave_empty(forward.count, outputs)
                else:
                    self._place_outputs(forward, output, outputs)
                    self._on_exit(forward, outputs)
                    if forward.earlier is not None:
                        forward.earlier.end()
        finally:
            for record, _ in forward.records:
                record.input_nodes = ()
            forward.records, forward.sharded, forward.own_axes = [], [], []
            forward.placements, forward.inputs, forward.earlier, forward.keyed_outputs = (), [], None, list

    def _leave_empty(self, count: Count, outputs: list[Tensor]) -> None:
        """A run without samples is over, and none of its calls was recorded, unless an output has samples after all."""
        if any(x.requires_grad and x.numel() for x in outputs):
            self.refuse(empty_batch(count))
        elif self._on_empty is not None:
            self._on_empty(outputs)

    def _place_outputs(self, forward: Forward, output: Any, outputs: list[Tensor]) -> None:
        """Note where the outputs have their samples. If they seem to have none, try other readings of the arguments."""
        forward.words, forward.keyed_outputs = self.words, partial(keyed_tensors, output)
        forward.placements = self._placed(forward, forward.count, output, outputs)
        if forward.n is None or some_has_samples(outputs, forward.placements):
            return
        for count in forward.count.alternatives(forward.bags):
            if some_has_samples(outputs, placements := self._placed(forward, count, output, outputs)):
                forward.placements = placements
                forward.settle(count)
                return

    def _placed(self, forward: Forward, count: Count, output: Any, outputs: list[Tensor]) -> list[Placement | None]:
        found = BatchSamples(count.n or -1, self.words, count.indices).placements("outputs", output)
        if len(found) < 2 or self.words.says_outputs:
            return found
        return without_those_of_parameters(outputs, found, count.n, forward.inputs, packs=forward.has_packed_inputs)

    def refuse(self, error: Exception) -> None:
        """Raise an error; in a backward pass, hand it over, so that it is raised when that pass is over."""
        if current_graph_task() == -1 or self._on_refusal is None:
            raise error
        self._on_refusal(error)

    def _note_skipped_pass(self, *_: Any) -> None:
        self.skipped_passes.add(current_graph_task())

    def is_skipped(self) -> bool:
        """Whether the backward pass under way in this thread has reached a run that was not recorded."""
        return bool(self.skipped_passes) and current_graph_task() in self.skipped_passes

    @contextmanager
    def noting_calls(self) -> Iterator[list[tuple[Record, GradientEdge]]]:
        """A block in which a part of the model runs again, with the list of its calls and where their gradients arrive."""
        thread = get_ident()
        found: list[tuple[Record, GradientEdge]] = []
        before, self._noting[thread] = self._noting.get(thread), found
        try:
            yield found
        finally:
            if before is None:
                del self._noting[thread]
            else:
                self._noting[thread] = before

    def note_call(self, record: Record, edge: GradientEdge) -> None:
        """Note a call that is run again, if somebody wants to know."""
        if (found := self._noting.get(get_ident())) is not None:
            found.append((record, edge))

    def is_transformed_in_run(self) -> bool:
        """Whether a call made now is one under a transform of torch.func, inside of a run of the model that is recorded."""
        return get_ident() in self._running and _is_transformed()

    def of_call(self, output: Any, axis: int) -> Forward | None:
        """The run that a module's call belongs to; None if the call is not recorded.

        Args:
            output: what the module returned.
            axis: the axis that counts its samples if the module was called outside of any run of the model.
        """
        thread = get_ident()
        if thread in self._skipping or not self.records_calls() or self.is_skipped():
            return None
        found = self._running.get(thread) or self._outside(output, axis)
        return None if found.n == 0 and found.count.n == 0 else found

    def _outside(self, output: Any, axis: int) -> Forward:
        """The run of a call that a checkpoint makes again, or that the user makes outside of any run of the model."""
        if LOOKS and (look := current_graph_task()) in LOOKS:
            return self._again(look)
        task, found = self._recomputation(current_graph_task()), self.outside_calls
        if task is not None:
            if found is None or found.recomputed_in != task:
                found = self._again(task)
        elif found is None or found.recomputed_in is not None or found.n not in (None, size_on(output, axis)):
            found = Forward(in_model_call=False)
        self.outside_calls = found
        return found

    def _again(self, task: int) -> Forward:
        """A run for the parts of the latest run of the model that a backward pass runs again."""
        latest = self.latest
        return Forward(latest.n, Counter(latest.calls), recomputed_in=task, count=latest.count)

    def _recomputation(self, task: int) -> int | None:
        """Report that a backward pass runs a forward again, and return its number; None for a task that is no such pass."""
        if task == -1:
            return None
        if self._on_recomputation is not None and task not in LOOKS:
            # If an earlier pass that runs something again is not over, this one belongs to a checkpoint inside of a checkpoint.
            before = self.outside_calls.recomputed_in if self.outside_calls is not None else None
            self._on_recomputation(task, task if before is None else before)
        return task

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """A block in which layers run again after the backward pass, for tensors that a checkpoint did not keep."""
        self._running[get_ident()] = self._again(-1)
        try:
            yield
        finally:
            del self._running[get_ident()]


def _is_transformed() -> bool:
    return innermost_transform() is not None or forward_mode_level() >= 0


def size_on(value: Any, axis: int) -> int | None:
    """How many indices a tensor has on an axis; None for anything else."""
    return value.shape[axis] if isinstance(value, Tensor) and value.dim() > axis else None
