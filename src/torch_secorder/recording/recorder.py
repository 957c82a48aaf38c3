"""The recorder: hands every gradient that arrives in a hooked model or its graph to the backward pass that it belongs to.

Whatever holds for one driver holds for all and stands here once: no autocast in our own sums, errors that wait until the pass is
over, a call seen twice, and the finish. Who starts a pass, when it ends and what is done then differs between the two kinds of
recorders: :class:`UserRecorder` for the user's own passes, ``GraphBackward`` for those that the library makes.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from threading import RLock, get_ident
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from torch_secorder.autograd.compiled import never_compiled
from torch_secorder.autograd.engine import (
    LIBRARY_PASSES,
    LIBRARY_THREADS,
    after_backward,
    current_graph_task,
    current_node,
    is_library_pass,
    raise_after_backward,
)
from torch_secorder.autograd.hooks import gradient_hooks
from torch_secorder.autograd.precision import autocast_devices, full_precision
from torch_secorder.batch_axis.knowledge import ModelKnowledge
from torch_secorder.capture.forwards import ForwardTracker
from torch_secorder.capture.module_hooks import ModuleHooks
from torch_secorder.capture.records import Forward, Record
from torch_secorder.errors import LifecycleError
from torch_secorder.graph.audit import Audit
from torch_secorder.graph.frontier import ParameterUse
from torch_secorder.model.hooks import HookScope
from torch_secorder.model.parameters import Table
from torch_secorder.model.ranks import full_tensor
from torch_secorder.per_sample import as_refusal, memory_limit
from torch_secorder.recording.accumulator import PassAccumulator, PassOptions
from torch_secorder.recording.backward_pass import BackwardPass, Check, counted_again
from torch_secorder.recording.gradient_norms import GradientNorms
from torch_secorder.recording.plan import Plan
from torch_secorder.recording.sample_norms import SampleNorms
from torch_secorder.recording.watched_passes import WatchedPasses


class Recorder(HookScope):
    """Hands every gradient that arrives in a hooked model or its graph to the accumulator of its backward pass.

    Args:
        table: what is analyzed.
        plan: the modules to hook, the states to refuse and the batch axis; the modules of a model that ran before aren't hooked.
        knowledge: what is known about the model already.
        options: what each pass collects.
        locate_on_three_samples: adds to the knowledge from a smaller batch, if there is a way.
        trust_shapes: believe shapes that allow one reading only, for callers that check a sample afterwards.
        attach_leaf: give outputs that need no gradient one, so that frozen layers are seen too.
        every: record every k-th call of the model, beginning with the first.
        only_library_calls: record calls that this library makes in this thread, instead of the user's.

    Attributes:
        counts_again: whether a second backward pass through the same forward counts its samples again.
    """

    counts_again = False

    def __init__(
        self,
        table: Table,
        plan: Plan,
        knowledge: ModelKnowledge,
        options: PassOptions,
        *,
        locate_on_three_samples: Callable[[], None] | None = None,
        trust_shapes: bool = False,
        attach_leaf: bool = False,
        every: int = 1,
        only_library_calls: bool = False,
    ):
        self.table, self.plan, self.options, self._knowledge = table, plan, options, knowledge
        self._audit = Audit(
            table,
            self._on_use_gradients,
            plan.batch_axis,
            knowledge,
            locate_on_three_samples,
            trust_shapes=trust_shapes,
        )
        self.forwards = ForwardTracker(
            plan.batch_axis,
            every=every,
            only_library_calls=only_library_calls,
            on_recomputation=self._on_recomputation,
            on_exit=self._on_model_exit,
        )
        self._module_hooks: ModuleHooks | None = None
        if plan.model is not None:
            self._module_hooks = ModuleHooks(
                plan.model, plan.sites, self._on_output_gradient, self.forwards, plan.guards, attach_leaf=attach_leaf
            )

    def _attach(self) -> None:
        if self._module_hooks is not None:
            self._module_hooks.__enter__()

    def _detach(self) -> None:
        if self._module_hooks is not None:
            self._module_hooks.__exit__()

    # ------------------------------------------------------------------------------------------------ what differs

    @abstractmethod
    def _pass_under_way(self, recomputed_in: int | None = None) -> BackwardPass | None:
        """The pass that a gradient which arrives now belongs to; None for passes that are not recorded.

        Args:
            recomputed_in: the pass that ran the forward of the gradient's call again, if one did.
        """

    def _on_recomputation(self, task: int, outer: int) -> None:
        """A forward runs again inside of a backward pass, which is nested in another one unless that is itself."""

    def _on_model_exit(self, forward: Forward, outputs: list[Tensor]) -> None:
        """The model returns these tensors, in whatever containers."""
        self._audit.uses(forward, outputs)

    # ------------------------------------------------------------------------------------------------ what arrives

    @never_compiled
    def _on_output_gradient(self, record: Record, output_nr: int, grads: tuple[Tensor | None, ...]) -> None:
        """The gradients of the node that made a module's output have arrived, inside a backward pass."""
        grad = grads[output_nr]
        if grad is None or record.placement is None:
            return
        current = self._pass_under_way(record.forward.recomputed_in)
        if current is not None:
            self._within(current, record, current.accumulator.add, record, grad)
        else:
            self._on_unrecorded_gradient(record)

    @never_compiled
    def _on_use_gradients(self, use: ParameterUse, grads: tuple[Tensor | None, ...]) -> None:
        """The gradients at a use of a parameter outside of any hooked module's call."""
        current = self._pass_under_way()
        if current is not None:
            self._within(current, use, current.accumulator.add_use, use, current_node(), grads)
        else:
            self._on_unrecorded_gradient(use)

    def _on_unrecorded_gradient(self, seen: Record | ParameterUse) -> None:
        """A gradient has arrived in a pass that is not recorded."""

    def _within(
        self, current: BackwardPass, seen: Record | ParameterUse | None, add: Callable[..., None], *args: Any
    ) -> None:
        """Add something to a backward pass; what goes wrong must wait for its end, so that the user's gradients are complete."""
        if current.error is not None:
            return
        try:
            if seen is not None and seen.last_pass != current.task:
                if seen.last_pass is not None and not self.counts_again:
                    raise counted_again(seen)
                seen.last_pass = current.task
            if current.special:
                with self._settings():
                    add(*args)
            else:
                add(*args)
        except Exception as error:
            current.error = as_refusal(error)

    # ------------------------------------------------------------------------------------------------ begin and finish

    def _begin(self, task: int, *, keep_inputs: bool = False, checks: bool = False) -> BackwardPass:
        gradients = GradientNorms()
        accumulator = PassAccumulator(
            self.table, self.options, keep_inputs=keep_inputs, checks=checks, gradients=gradients
        )
        in_autocast = bool(autocast_devices())
        accumulator.half = in_autocast  # autograd rounds its own gradients then, also those that it returns in float32
        return BackwardPass(task, accumulator, gradients, in_autocast or self.options.max_memory is not None)

    def _settings(self) -> ExitStack:
        """Inside, our sums are in full precision, also in an autocast block, and within the memory that they may take."""
        stack = full_precision()
        stack.enter_context(memory_limit(self.options.max_memory))
        return stack

    def finish(self, current: BackwardPass, nonfinite: str = "raise", checks: Sequence[Check] = ()) -> SampleNorms:
        """What a backward pass says of its samples, if nothing went wrong and it passes the checks.

        Raises:
            CurvatureError: what went wrong, or what a check finds.
        """
        if current.error is not None:
            raise current.error
        try:
            with self._settings() if current.special else nullcontext():
                samples = current.accumulator.finish(nonfinite)
                for check in checks:
                    check(current, samples)
        except Exception as error:
            raise as_refusal(error)  # noqa: B904  # a refusal names its cause itself
        if current.accumulator.slow and not self._knowledge.warned_of_slow_rules:
            self._knowledge.warned_of_slow_rules = current.accumulator.warned()
        return samples


class UserRecorder(Recorder):
    """Records the user's backward passes, each from its first gradient to the engine's word that it is over.

    Args:
        on_pass: called with each pass that is over; what it raises is raised at the end of that backward pass.
        checks_next: says whether the next pass also notes its gradients along one direction, to compare sums.
        options: as for :class:`Recorder`.
    """

    def __init__(
        self,
        *args: Any,
        on_pass: Callable[[BackwardPass], None],
        checks_next: Callable[[], bool] = lambda: False,
        every: int = 1,
        **options: Any,
    ):
        super().__init__(*args, every=every, **options)
        self._on_pass, self._checks_next, self._every = on_pass, checks_next, every
        can_count = any(leaf.requires_grad for leaf in self.table.leaves) if every > 1 else False
        self._watched = WatchedPasses(every if can_count else 1, self._count_passes, super()._attach, super()._detach)
        self.counts_again = self.options.repeated_calls == "new"
        self._passes: WeakValueDictionary[int, BackwardPass] = WeakValueDictionary()
        self._outer_of: dict[int, int] = {}  # a backward pass inside of another one (checkpointing) -> the outer one
        self._counting = RLock()  # several threads may train the model
        self._outputs: list[weakref.ref[Tensor]] = []
        self._refused = -1  # the latest pass that is not watched and reached samples which were counted

    @property
    def outputs(self) -> list[Tensor]:
        """The outputs of the model's latest call that are still there and can be differentiated."""
        return [x for reference in self._outputs if (x := reference()) is not None and x.requires_grad]

    def _attach(self) -> None:
        self._watched.enter()
        super()._attach()

    def _detach(self) -> None:
        self._watched.leave()
        self._passes.clear()
        self._outer_of.clear()
        super()._detach()

    def _count_passes(self) -> None:
        """Compiled code is called inside the block: from now on backward passes are counted, and not calls of the model."""
        self.forwards.every = 1

    def _on_model_exit(self, forward: Forward, outputs: list[Tensor]) -> None:
        super()._on_model_exit(forward, outputs)
        self._outputs = list(map(weakref.ref, outputs))

    def _on_recomputation(self, task: int, outer: int) -> None:
        self._nest(task, outer)
        number = self._outer_of.get(task, task)
        if number not in self._passes:
            self._open(number)

    def _nest(self, task: int, outer: int) -> None:
        """Let a pass belong to the one that it is nested in, or to the one around that."""
        outermost = self._outer_of.get(outer, outer)
        if outermost != task:
            self._outer_of[task] = outermost

    @never_compiled
    def on_parameter_gradient(self, position: int, grad: Tensor) -> None:
        """The gradient of a parameter, as this backward pass adds it to ``.grad``."""
        # Re-entrant checkpointing has backward passes inside of one that is skipped; those open none of ours.
        if self.forwards.skipped_passes and not self._passes:
            return
        current = self._pass_under_way()
        if current is None:
            if self._watched.resting:
                self._watched.note_gradient()
            return
        # What a hook of the user's makes of a gradient is not in its factors, and not ours to check.
        as_computed = len(gradient_hooks(self.table.leaves[position]) or ()) <= 1
        if type(grad) is Tensor and not current.accumulator.checks:
            self._within(current, None, current.gradients.add, position, grad, as_computed)
        else:
            self._within(current, None, self._add_checked_gradient, current, position, grad, as_computed)

    def _add_checked_gradient(self, current: BackwardPass, position: int, grad: Tensor, as_computed: bool) -> None:
        grad = full_tensor(grad)
        current.gradients.add(position, grad, as_computed)
        if current.accumulator.checks and as_computed and not grad.is_sparse:
            current.project(position, grad)

    def _on_unrecorded_gradient(self, seen: Record | ParameterUse) -> None:
        task = current_graph_task()
        if self._watched.resting and not self.counts_again and seen.last_pass not in (None, task):
            seen.last_pass = task
            if task != self._refused and not is_library_pass(task):
                self._refused = task
                raise_after_backward(counted_again(seen))

    def _pass_under_way(self, recomputed_in: int | None = None) -> BackwardPass | None:
        task = current_graph_task()
        if not self.forwards.active or task in LIBRARY_PASSES or get_ident() in LIBRARY_THREADS:
            return None
        if recomputed_in is not None and recomputed_in != task:
            self._nest(task, recomputed_in)
        number = self._outer_of.get(task, task)
        current = self._passes.get(number) or self._open(number)
        if self.forwards.skipped_passes and task in self.forwards.skipped_passes and current.error is None:
            current.error = LifecycleError(
                f"one backward pass reached a call of the model that every={self._every} passed over, and one that it did not: "
                "enter and leave the monitor's block for the steps to watch instead"
            )
        return current

    def _open(self, task: int) -> BackwardPass:
        # Beside the watched calls, a pass may reach calls of compiled code, which no hook has seen; the sums show it.
        checks = self._checks_next() or self._watched.are_counted
        current = self._begin(task, keep_inputs=self.counts_again, checks=checks)
        self._passes[task] = current
        # Only autograd keeps the pass alive: one that an exception breaks off is gone with its traceback.
        after_backward(partial(self._close, current))
        return current

    @never_compiled
    def _close(self, current: BackwardPass) -> None:
        """A backward pass is over: hand it on, or raise why not. The user's gradients are complete by now."""
        if self._passes.pop(current.task, None) is None or not self.forwards.active:
            return
        if self._outer_of:
            self._outer_of = {inner: outer for inner, outer in self._outer_of.items() if outer != current.task}
        self.forwards.outside_calls = None
        try:
            with torch.no_grad(), self._counting:
                self._on_pass(current)
        except Exception as error:
            raise_after_backward(as_refusal(error))
        self._watched.pass_over()
