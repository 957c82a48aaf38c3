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

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from torch_secorder.autograd.engine import (
    LIBRARY_PASSES,
    LIBRARY_THREADS,
    after_backward,
    current_graph_task,
    current_node,
    is_vmapped,
    leaf_of,
    raise_after_backward,
)
from torch_secorder.autograd.hooks import gradient_hooks
from torch_secorder.autograd.precision import autocast_devices, full_precision
from torch_secorder.autograd.second_derivatives import GradientGraphWatch
from torch_secorder.autograd.tensor_hooks import are_last, put_last
from torch_secorder.batch_axis.knowledge import ModelKnowledge
from torch_secorder.capture.forwards import ForwardTracker
from torch_secorder.capture.module_hooks import ModuleHooks
from torch_secorder.capture.records import Forward, Record
from torch_secorder.errors import LifecycleError, UnsupportedError
from torch_secorder.graph.audit import Audit
from torch_secorder.graph.frontier import ParameterUse
from torch_secorder.model.hooks import HookScope
from torch_secorder.model.parameters import Table, plain_name
from torch_secorder.model.ranks import full_tensor, is_dtensor
from torch_secorder.per_sample import as_refusal, memory_limit
from torch_secorder.recording.accumulator import PassAccumulator, PassOptions
from torch_secorder.recording.backward_pass import BackwardPass, Check, counted_again, replaced, vmapped_pass
from torch_secorder.recording.gradient_norms import GradientNorms
from torch_secorder.recording.passes import UserPasses
from torch_secorder.recording.plan import Plan
from torch_secorder.recording.sample_norms import SampleNorms


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
            on_refusal=self._on_refusal_in_forward,
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
    def _pass_under_way(self, grad: Tensor | None, recomputed_in: int | None = None) -> BackwardPass | None:
        """The pass that a gradient which arrives now belongs to; None for passes that are not recorded.

        Args:
            grad: the gradient.
            recomputed_in: the pass that ran the forward of the gradient's call again, if one did.
        """

    def _on_recomputation(self, task: int, outer: int) -> None:
        """A forward runs again inside of a backward pass, which is nested in another one unless that is itself."""

    def _on_refusal_in_forward(self, error: Exception) -> None:
        """A forward that runs again inside of a backward pass can't be recorded."""
        raise error

    def _on_model_exit(self, forward: Forward, outputs: list[Tensor]) -> None:
        """The model returns these tensors, in whatever containers."""
        self._audit.uses(forward, outputs)

    # ------------------------------------------------------------------------------------------------ what arrives

    def _on_output_gradient(self, record: Record, output_nr: int, grads: tuple[Tensor | None, ...]) -> None:
        """The gradients of the node that made a module's output have arrived, inside a backward pass."""
        grad = grads[output_nr]
        if grad is None or record.placement is None:
            return
        current = self._pass_under_way(grad, record.forward.recomputed_in)
        if current is not None:
            self._within(current, record, current.accumulator.add, record, grad)

    def _on_use_gradients(self, use: ParameterUse, grads: tuple[Tensor | None, ...]) -> None:
        """The gradients at a use of a parameter outside of any hooked module's call."""
        current = self._pass_under_way(first_of(grads), use.forward.recomputed_in)
        if current is not None:
            self._within(current, use, current.accumulator.add_use, use, current_node(), grads)

    def _within(
        self, current: BackwardPass, seen: Record | ParameterUse | Forward | None, add: Callable[..., None], *args: Any
    ) -> None:
        """Add something to a backward pass; what goes wrong must wait for its end, so that the user's gradients are complete."""
        if current.error is not None:
            return
        try:
            if seen is not None:
                self._require_first_pass(current, seen)
            if current.special:
                with self._settings():
                    add(*args)
            else:
                add(*args)
        except Exception as error:
            current.error = as_refusal(error)
        except BaseException:  # an interrupt, which ends the pass and whose traceback may outlive it
            self._abandon(current)
            raise

    def _abandon(self, current: BackwardPass) -> None:
        """A pass is broken off: nothing that comes belongs to it."""

    def _require_first_pass(self, current: BackwardPass, seen: Record | ParameterUse | Forward) -> None:
        """Raise if another backward pass has counted the samples already that this one reaches."""
        # A call of the model is one forward, whichever of its layers a pass reaches. Calls of submodules alone may be of
        # different losses, as a generator's and a discriminator's are, and each stands for itself.
        if not isinstance(seen, Forward) and seen.forward.in_model_call and seen.forward.recomputed_in is None:
            first: Record | ParameterUse | Forward = seen.forward
        else:
            first = seen
        if first.last_pass == current.task:
            return
        if first.last_pass is not None and not self.counts_again:
            raise counted_again(seen)
        first.last_pass = current.task

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

    Attributes:
        waiting: refusals of passes at whose end nothing could be raised, for the end of the block.
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
        self.counts_again = self.options.repeated_calls == "new"
        self._passes = UserPasses(self.table.leaves, self.plan.model)
        self._gradient_graphs: dict[int, GradientGraphWatch] = {}  # of ignored passes with create_graph=True
        self._counting = RLock()  # several threads may train the model
        self._outputs: list[weakref.ref[Tensor]] = []
        self.waiting: list[Exception] = []
        assert self.plan.model is not None
        self._parameters = dict(self.plan.model.named_parameters())  # as they are on entry
        self._known_leaves: set[Node] = (
            set()
        )  # of tensors that are not analyzed, and are none of the model's new parameters

    @property
    def outputs(self) -> list[Tensor]:
        """The outputs of the model's latest call that are still there and can be differentiated."""
        return [x for reference in self._outputs if (x := reference()) is not None and x.requires_grad]

    def _detach(self) -> None:
        self._passes.clear()
        for watch in self._gradient_graphs.values():
            watch.close()
        self._gradient_graphs.clear()
        self._known_leaves.clear()
        super()._detach()

    # ------------------------------------------------------------------------------------------------ what happens in forward

    def _on_model_exit(self, forward: Forward, outputs: list[Tensor]) -> None:
        if self._passes:
            self._passes.forget_broken_off()
        super()._on_model_exit(forward, outputs)
        self._outputs = list(map(weakref.ref, outputs))
        for edge in self._audit.other_leaves:
            if edge.node not in self._known_leaves and isinstance(variable := leaf_of(edge.node), nn.Parameter):
                self._require_known(forward, edge.node, variable)
        for node in {x.grad_fn for x in outputs if x.grad_fn is not None}:
            node.register_prehook(partial(self._on_outputs_gradient, forward))

    def _require_known(self, forward: Forward, node: Node, variable: nn.Parameter) -> None:
        """Have the pass through a forward refused if it used a parameter that was put into the model inside of the block."""
        assert self.plan.model is not None
        for name, p in self.plan.model.named_parameters():
            if p is variable and name in self._parameters and is_dtensor(self._parameters[name]):
                return
            if p is variable and self._parameters.get(name) is not p:
                forward.refusal = replaced([plain_name(name)])
                return
        self._known_leaves.add(node)

    def _on_recomputation(self, task: int, outer: int) -> None:
        if self._passes.of(task) is not None:
            return
        if task not in self._passes.ignored and not self._is_of_samples():
            self._passes.ignore(task)  # but what begins inside of it may be of the samples
        number = self._passes.nest(task, outer)
        if self._passes.of(number) is None:
            self._open(number)

    def _on_refusal_in_forward(self, error: Exception) -> None:
        task = current_graph_task()
        self._on_recomputation(task, task)
        current = self._passes.of(task)
        if current is not None and current.error is None:
            current.error = error

    # ------------------------------------------------------------------------------------------------ what arrives

    def _on_outputs_gradient(self, forward: Forward, grads: tuple[Tensor | None, ...]) -> None:
        """A backward pass reaches what the model returned."""
        current = self._pass_under_way(first_of(grads))
        if current is not None:
            self._reach(current, forward)
        elif (reached := self._passes.ignored.get(current_graph_task())) is not None:
            reached.append(forward)

    def _reach(self, current: BackwardPass, forward: Forward) -> None:
        """The samples of a call of the model are those of this pass."""
        self._within(current, forward, lambda: None)
        if forward.refusal is not None and current.error is None:
            current.error = forward.refusal

    def on_parameter_gradient(self, position: int, grad: Tensor) -> None:
        """The gradient of a parameter, as this backward pass adds it to ``.grad``."""
        # Re-entrant checkpointing has backward passes inside of one that is skipped; those open none of ours.
        if self.forwards.skipped_passes and not self._passes:
            return
        current = self._pass_under_way(grad)
        if current is None:
            return
        leaf = self.table.leaves[position]
        alone = len(gradient_hooks(leaf) or ()) <= 1
        as_added = alone or are_last(leaf)  # A hook that was put on in this very pass comes after ours.
        if type(grad) is Tensor and not current.accumulator.checks:
            self._within(current, None, current.gradients.add, position, grad, as_added)
        else:
            self._within(current, None, self._add_checked_gradient, current, position, grad, as_added, alone)

    def _add_checked_gradient(
        self, current: BackwardPass, position: int, grad: Tensor, as_added: bool, alone: bool
    ) -> None:
        grad = full_tensor(grad)
        current.gradients.add(position, grad, as_added)
        # What a hook of the user's makes of a gradient is not in its factors, and not ours to check.
        if current.accumulator.checks and alone and not grad.is_sparse:
            current.project(position, grad)

    def _on_gradient_graph(self, grads: tuple[Tensor | None, ...]) -> None:
        """A backward pass goes through the graph of gradients that another one made."""
        current = self._pass_under_way(first_of(grads))
        if current is not None and current.error is None:
            current.error = UnsupportedError(
                "the backward pass goes through the graph of a gradient (create_graph=True: a gradient penalty, forces, the "
                "residual of an equation), where parameters are used in ways that belong to no layer's call: differentiate such "
                "a loss outside of the monitor's block; the batch is left out"
            )

    # ------------------------------------------------------------------------------------------------ which pass it is

    def _abandon(self, current: BackwardPass) -> None:
        self._passes.close(current)

    def _pass_under_way(self, grad: Tensor | None, recomputed_in: int | None = None) -> BackwardPass | None:
        task = current_graph_task()
        if not self.forwards.active or task in LIBRARY_PASSES or get_ident() in LIBRARY_THREADS:
            return None
        if task in self._passes.ignored:
            self._watch_gradient_graph(task)
            return None
        current = self._passes.of(task) or self._begun(task, grad, recomputed_in)
        skipped = self.forwards.skipped_passes
        if skipped and task in skipped and current is not None and current.error is None:
            current.error = LifecycleError(
                f"one backward pass reached a call of the model that every={self._every} passed over, and one that it did not: "
                "enter and leave the monitor's block for the steps to watch instead"
            )
        return current

    def _begun(self, task: int, grad: Tensor | None, recomputed_in: int | None) -> BackwardPass | None:
        """A pass that something arrives in for the first time, or the one around it; None if it is none of the samples."""
        vmapped = grad is not None and is_vmapped(grad)
        of_samples = self._is_of_samples()
        if of_samples and not vmapped:
            number = self._passes.nest(task, recomputed_in)
            current = self._passes.of(number) or self._open(number)
            for forward in self._passes.ignored.get(number, ()):
                self._reach(current, forward)
            return current
        if of_samples:
            self.waiting.append(vmapped_pass())
        self._passes.ignore(task)
        self._watch_gradient_graph(task)
        return None

    def _is_of_samples(self) -> bool:
        try:
            return self._passes.is_of_samples()
        except UnsupportedError as error:
            self.waiting.append(error)
            return False

    def _watch_gradient_graph(self, task: int) -> None:
        """If an ignored pass makes a graph of its gradients, notice when a later one goes through it."""
        if not torch.is_grad_enabled():
            return
        watch = self._gradient_graphs.get(task)
        if watch is None:
            watch = self._gradient_graphs[task] = GradientGraphWatch(self._on_gradient_graph)
            after_backward(partial(self._leave_gradient_graph, task))
        watch.watch_below(current_node())

    def _leave_gradient_graph(self, task: int) -> None:
        if (watch := self._gradient_graphs.pop(task, None)) is not None:
            watch.close()

    def _open(self, task: int) -> BackwardPass:
        current = self._begin(task, keep_inputs=self.counts_again, checks=self._checks_next())
        self._passes.open(current)
        for leaf in self.table.leaves:
            put_last(leaf)
        # Only autograd keeps the pass alive: one that an exception breaks off is gone with its traceback.
        after_backward(partial(self._close, current))
        return current

    def _close(self, current: BackwardPass) -> None:
        """A backward pass is over: hand it on, or raise why not. The user's gradients are complete by now."""
        if not self._passes.close(current) or not self.forwards.active:
            return
        empty = current.accumulator.is_empty
        if empty and current.task in self._passes.ignored:
            return
        self.forwards.outside_calls = None
        try:
            with torch.no_grad(), self._counting:
                self._on_pass(current)
        except Exception as error:
            raise_after_backward(as_refusal(error))


def first_of(grads: Sequence[Tensor | None]) -> Tensor | None:
    """The first gradient that is there."""
    return next((grad for grad in grads if grad is not None), None)
