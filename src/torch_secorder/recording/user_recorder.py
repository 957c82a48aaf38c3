"""The user's own backward passes: which of them are recorded, when they begin and end, and what waits for their end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from threading import RLock, get_ident
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from torch_secorder.autograd.compiled import never_compiled
from torch_secorder.autograd.engine import (
    LIBRARY_PASSES,
    LIBRARY_THREADS,
    after_backward,
    current_graph_task,
    is_library_pass,
    keeps_graph,
    raise_after_backward,
)
from torch_secorder.autograd.hooks import gradient_hooks
from torch_secorder.autograd.leaf_nodes import LeafNodes
from torch_secorder.autograd.node_hooks import HookTable
from torch_secorder.autograd.roots import kind_of_loss, reduction_of_loss
from torch_secorder.autograd.tensor_hooks import put_last
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.capture.model_run import Forward
from torch_secorder.capture.records import Record
from torch_secorder.graph.reruns import Reruns
from torch_secorder.graph.uses import ParameterUse
from torch_secorder.per_sample import as_refusal
from torch_secorder.recording.backward_pass import BackwardPass, counted_again, partly_passed_over
from torch_secorder.recording.calls_to_verify import outputs_of_loss
from torch_secorder.recording.changed_gradients import ChangedGradients
from torch_secorder.recording.gradient_graphs import GradientGraphs, through_gradient_graph
from torch_secorder.recording.history import History
from torch_secorder.recording.model_outputs import ModelOutputs
from torch_secorder.recording.new_parameters import NewParameters
from torch_secorder.recording.parameter_gradients import ParameterGradients
from torch_secorder.recording.passes import UserPasses
from torch_secorder.recording.quantities import QUANTITIES
from torch_secorder.recording.recorder import Recorder, counted_as
from torch_secorder.recording.watched_passes import WatchedPasses
from torch_secorder.recording.whole_passes import WholePasses


class UserRecorder(Recorder):
    """Records the user's backward passes, each from its first gradient until the engine reports its end.

    Args:
        history: counts what happens, for messages.
        on_pass: called with this recorder and each pass that is over; the pass raises its errors at its end.
        checks_next: tells from the kind of a pass whether it also projects its gradients on one direction, to compare sums.
        options: as for :class:`Recorder`.

    Attributes:
        with_gradient: how many of the analyzed parameters require a gradient.
        waiting: refusals of passes that could not raise at their own end; they are raised at the end of the block.
    """

    of_user = True

    def __init__(
        self,
        *args: Any,
        history: History,
        on_pass: Callable[[UserRecorder, BackwardPass], None],
        checks_next: Callable[[int], bool] = lambda kind: False,
        every: int = 1,
        **options: Any,
    ):
        super().__init__(*args, every=every, **options)
        self._on_pass, self._checks_next, self._every = on_pass, checks_next, every
        self._history, history.every = history, every
        history.blocks += 1
        can_count = any(leaf.requires_grad for leaf in self.table.leaves) if every > 1 else False
        self._watched = WatchedPasses(every if can_count else 1, self._count_passes, super()._attach, super()._detach)
        self._refused = -1  # the latest unwatched pass that reached samples which were counted already
        self.counts_again = self.options.repeated_calls == "new"
        leaves = self._audit.leaves
        self.with_gradient = len(leaves)
        every_one = len(leaves) == len(self.table) > 0
        self._new_parameters = NewParameters(self.plan.model, self.plan.modules, leaves, self.table.names)
        watches = any(QUANTITIES[name].watches_outputs for name in self.options.quantities)
        of_passes = (leaves, self._new_parameters.refused, self._audit.renew_leaves, every_one, self.plan.model)
        self._passes = UserPasses(*of_passes, self._let_wait, watches_outputs=watches)
        self._known_passes = self._passes.known
        self._whole = WholePasses(self.table.names, self._audit.leaves)
        self._gradients = ParameterGradients(
            *(self.table, self._audit.leaves, self.forwards, self._passes, self._watched),
            pass_under_way=self._pass_under_way,
            within=self._within,
        )
        self._gradient_graphs = GradientGraphs(self._on_gradient_graph)
        self._changed = ChangedGradients(self.table.leaves, self, self._described)
        self._counting = RLock()  # several threads may train the model
        self._outputs = ModelOutputs()
        self._reruns = Reruns(self.forwards, self._knowledge, self._audit.leaves)
        self.waiting: list[Exception] = []

    def outputs_to_verify(self, loss: Tensor) -> tuple[int, list[tuple[Tensor, Placement]]]:
        """The number of samples, and the outputs that a loss depends on, for a backward pass that is still to come.

        Raises:
            LifecycleError: if there are none to verify, or some are gone.
        """
        same_samples = self.options.repeated_calls == "same"
        return outputs_of_loss(self._outputs.calls, loss, counts_again=self.counts_again, same_samples=same_samples)

    def _attach(self) -> None:
        self._watched.enter()
        super()._attach()
        self._gradients.attach()

    def _detach(self) -> None:
        self._gradients.detach()
        self._watched.leave()
        self._passes.clear()
        self._gradient_graphs.close()
        self._new_parameters.clear()
        self._outputs.calls.clear()
        super()._detach()
        # These nodes have the parameters' present shapes. As long as one of them lives, torch makes no other for its parameter.
        # Another thread may be reading the mapping, which therefore stays as it is.
        self._audit.leaves = self._passes.leaves = self._whole.leaves = self._reruns.leaves = LeafNodes({})

    def _count_passes(self) -> None:
        """Count backward passes instead of calls of the model from now on, since compiled code was called inside the block."""
        self.forwards.every = 1

    # ------------------------------------------------------------------------------------------------ what happens in forward

    def _on_model_exit(self, forward: Forward, outputs: list[Tensor]) -> None:
        if self._passes.under_way:
            self._passes.forget_broken_off()
        super()._on_model_exit(forward, outputs)
        self._outputs.keep(forward, outputs)
        if self._audit.checkpoints:
            self._reruns.watch(self._audit.checkpoints, forward.n or 0)
        if self._audit.other_leaves:
            self._new_parameters.refuse_in(forward, self._audit.other_leaves)
        nodes = {x.grad_fn for x in outputs if x.grad_fn is not None}
        if nodes:
            self._history.forwards += 1
        else:
            self._history.without_gradient += 1
        for node in nodes:
            node.register_prehook(partial(self._on_outputs_gradient, forward))

    def _on_empty_batch(self, outputs: list[Tensor]) -> None:
        self._history.without_samples += 1
        for node in {x.grad_fn for x in outputs if x.grad_fn is not None}:
            node.register_prehook(self._on_gradient_of_empty_batch)

    def _on_recomputation(self, task: int, outer: int) -> None:
        if self._passes.of(task) is not None:
            return
        if task not in self._passes.ignored and not self._passes.is_of_samples():
            self._passes.ignore(task)  # A pass that begins inside of it may be of the samples.
        if self._passes.of(number := self._passes.nest(task, outer)) is None:
            self._open(number)

    def _on_refusal_in_forward(self, error: Exception) -> None:
        task = current_graph_task()
        self._on_recomputation(task, task)
        current = self._passes.of(task)
        if current is not None and current.error is None:
            current.error = error

    # ------------------------------------------------------------------------------------------------ what arrives

    def _on_outputs_gradient(self, forward: Forward, grads: tuple[Tensor | None, ...]) -> None:
        """Called when a backward pass reaches an output of the model."""
        if (current := self._pass_under_way(grads)) is not None:
            self._reach(current, forward)
            if current.accumulator.checks:
                current.loss_reduction = reduction_of_loss()
                if self._outputs.column is forward:
                    current.broadcast = self._outputs.broadcast(forward)
        elif (reached := self._passes.ignored.get(current_graph_task())) is not None:
            reached.append(forward)
        elif not self.forwards.active:
            self._history.late_passes += 1

    def _on_gradient_of_empty_batch(self, grads: tuple[Tensor | None, ...]) -> None:
        if (current := self._pass_under_way(grads)) is not None:
            current.is_of_empty_batch = True

    def _watch_others(self, current: BackwardPass, table: HookTable) -> None:
        self._changed.watch(current, table)

    def _on_node_with_hooks(self, current: BackwardPass, seen: Record | ParameterUse, table: HookTable) -> None:
        self._changed.require_watched(current, seen, table)

    def _before_node(self, record: Record, grads: tuple[Tensor | None, ...]) -> None:
        if (table := record.node_hooks()) is None or len(table) == 1:
            return
        current = self._pass_under_way(grads, record.forward.recomputed_in)
        if current is not None:
            self._watch_others(current, table)

    def _on_unrecorded_gradient(self, seen: Record | ParameterUse) -> None:
        task, counted = current_graph_task(), counted_as(seen)
        if not self._watched.resting or self.counts_again or counted.last_pass in (None, task) or is_library_pass(task):
            return
        if task != self._refused and self._passes.is_of_samples():
            self._refused = counted.last_pass = task
            raise_after_backward(counted_again(seen))

    def _on_gradient_graph(self, grads: tuple[Tensor | None, ...]) -> None:
        """Called when a backward pass goes through the graph of gradients that another pass made."""
        current = self._pass_under_way(grads)
        if current is not None and current.error is None:
            current.error = through_gradient_graph()

    def require_whole(self, current: BackwardPass, positions: Sequence[int]) -> None:
        """Refuse a pass, at its end, that left some parameters without a gradient since only others were asked for."""
        if current.error is None and current_graph_task() == current.task:
            self._audit.renew_leaves()
            current.error = self._whole.refusal(current.kind, positions)

    # ------------------------------------------------------------------------------------------------ which pass it is

    def _abandon(self, current: BackwardPass) -> None:
        self._passes.close(current)

    def _counts_samples_again(self, last_pass: int) -> bool:
        return super()._counts_samples_again(last_pass) or self._passes.is_broken_off(last_pass)

    def _pass_under_way(self, grads: Sequence[Tensor | None], recomputed_in: int | None = None) -> BackwardPass | None:
        task = current_graph_task()
        if not self.forwards.active or task in LIBRARY_PASSES or get_ident() in LIBRARY_THREADS:
            return None
        if task in self._passes.ignored:
            self._gradient_graphs.watch(task)
            return None
        current = (self._passes.of(task) if self._passes.under_way else None) or self._begun(task, grads, recomputed_in)
        if current is None:
            return None
        if self._every == 1:  # with every > 1 the pass may still reach a call that was passed over
            self._known_passes[task] = ref(current)
        elif task in self.forwards.skipped_passes and current.error is None:
            current.error = partly_passed_over(self._every)
        return current

    def _begun(self, task: int, grads: Sequence[Tensor | None], recomputed_in: int | None) -> BackwardPass | None:
        """The pass in which a first gradient arrives, or the pass around it; None if it is not of the samples."""
        number = self._passes.outermost(task, grads, recomputed_in)
        if number is None:
            self._history.other_passes += 1
            self._gradient_graphs.watch(task)
            return None
        current = (self._passes.of(number) if number != task else None) or self._open(number)
        for forward in self._passes.ignored.get(number, ()):
            self._reach(current, forward)
        return current

    def _let_wait(self, error: Exception) -> None:
        self.waiting.append(error)
        self._history.refuse(error)

    def _open(self, task: int) -> BackwardPass:
        # One place of a program may differentiate several losses, and each of them is checked.
        kind = hash((self._audit.kind, kind_of_loss(self._outputs.numbers, self._audit.leaves)))
        # Besides watched calls, a pass may reach calls of compiled code that no hook has seen; the sums show that.
        checks = self._checks_next(kind) or self._watched.are_counted
        # If the graph is kept, the pass may be made again after an exception has broken it off.
        current = self.lifecycle.begin(task, keep_inputs=self.counts_again or keeps_graph(), checks=checks)
        current.kind = kind
        self._passes.under_way[current.task] = current
        self._passes.unfinished.add(current.task)
        # Hooks of the user's that are there when a pass begins may change a gradient, so that ours run after them.
        for leaf in self.table.leaves:
            if len(gradient_hooks(leaf) or ()) > 1:
                put_last(leaf)
        # Only autograd keeps the pass alive: a pass that an exception breaks off is gone with its traceback.
        after_backward(partial(self._close, current))
        return current

    @never_compiled
    def _close(self, current: BackwardPass) -> None:
        """Called at the end of a backward pass, when the user's gradients are complete: hand the pass on, or raise why not."""
        self._passes.unfinished.discard(current.task)
        if not self._passes.close(current) or not self.forwards.active:
            return
        if current.accumulator.is_empty and current.task in self._passes.ignored:
            return
        self.forwards.outside_calls = None
        try:
            with torch.no_grad(), self._counting:
                self._on_pass(self, current)
        except Exception as error:
            self._history.refuse(error)
            raise_after_backward(as_refusal(error))
        if self._watched.are_counted:
            self._watched.pass_over()
