"""The recorder: hands every gradient that arrives in a hooked model or its graph to the backward pass that it belongs to.

This file has what all recorders do: they take their sums without autocast, keep errors until the pass is over, and refuse a call
that is counted twice. The two kinds of recorders differ in who starts a pass, when it ends and what is done then:
``UserRecorder`` is for the user's own passes, ``GraphBackward`` for passes that the library makes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from torch_secorder.autograd.compiled import never_compiled
from torch_secorder.autograd.engine import active_modes, current_graph_task, current_node, without_modes
from torch_secorder.autograd.node_hooks import HookTable, NodeHook, call_with_gradients
from torch_secorder.batch_axis.knowledge import ModelKnowledge
from torch_secorder.batch_axis.trust import BY_SEARCH, Trust
from torch_secorder.capture.forwards import ForwardTracker
from torch_secorder.capture.model_run import Forward
from torch_secorder.capture.module_hooks import ModuleHooks
from torch_secorder.capture.records import Record
from torch_secorder.errors import CurvatureError, LifecycleError
from torch_secorder.graph.audit import Audit
from torch_secorder.graph.uses import IdleUse, ParameterUse, Uses
from torch_secorder.model.hooks import HookScope
from torch_secorder.model.parameters import Table
from torch_secorder.recording.backward_pass import BackwardPass, PassReference, counted_again, described
from torch_secorder.recording.foreign_errors import refusal_of
from torch_secorder.recording.lifecycle import PassLifecycle
from torch_secorder.recording.options import PassOptions
from torch_secorder.recording.plan import Plan
from torch_secorder.recording.shared_outputs import place_outputs


class Recorder(HookScope):
    """Hands every gradient that arrives in a hooked model or its graph to the accumulator of its backward pass.

    Args:
        table: what is analyzed.
        plan: the modules to hook, the states to refuse and the batch axis; a model that ran before is not hooked.
        knowledge: what is known about the model already.
        options: what each pass collects.
        locate_on_three_samples: adds to the knowledge from a smaller batch, if that is possible.
        trust: what is believed of where samples are.
        attach_leaf: whether outputs that need no gradient get one, so that frozen layers are seen too.
        every: record every k-th call of the model, beginning with the first.
        only_library_calls: record calls that this library makes in this thread, instead of the user's.

    Attributes:
        counts_again: whether a second backward pass through the same forward counts its samples again.
        of_user: whether the passes are the user's.
        lifecycle: how the passes begin and end.
    """

    counts_again = False
    of_user = False

    def __init__(
        self,
        table: Table,
        plan: Plan,
        knowledge: ModelKnowledge,
        options: PassOptions,
        *,
        locate_on_three_samples: Callable[[], None] | None = None,
        trust: Trust = BY_SEARCH,
        attach_leaf: bool = False,
        every: int = 1,
        only_library_calls: bool = False,
    ):
        self.table, self.plan, self.options, self._knowledge = table, plan, options, knowledge
        self._watches_outputs = any(site.rule is None for site in plan.sites)
        self._described = partial(described, table)
        self.lifecycle = PassLifecycle(table, knowledge, options, of_user=self.of_user)
        self._audit = Audit(table, knowledge, locate_on_three_samples, trust)
        self.forwards = ForwardTracker(
            plan.words,
            every=every,
            only_library_calls=only_library_calls,
            follows_runs=self.of_user and options.repeated_calls == "same",
            on_recomputation=self._on_recomputation,
            on_refusal=self._on_refusal_in_forward,
            on_exit=self._on_model_exit,
            on_empty=self._on_empty_batch if self.of_user else None,
        )
        # Number of a running pass -> a reference to the pass that it belongs to, where that is known.
        self._known_passes: dict[int, PassReference] = {}
        self._module_hooks: ModuleHooks | None = None
        if plan.model is not None:
            self._module_hooks = ModuleHooks(
                *(plan.model, plan.modules, plan.sites, self._on_output_gradient, self.forwards, plan.guards),
                before_node=self._before_node,
                attach_leaf=attach_leaf,
            )

    def _attach(self) -> None:
        self.lifecycle.note_devices()
        if self._module_hooks is not None:
            self._module_hooks.__enter__()

    def _detach(self) -> None:
        if self._module_hooks is not None:
            self._module_hooks.__exit__()

    # ------------------------------------------------------------------------------------------------ what differs

    @abstractmethod
    def _pass_under_way(self, grads: Sequence[Tensor | None], recomputed_in: int | None = None) -> BackwardPass | None:
        """The pass that gradients which arrive now belong to; None for passes that are not recorded.

        Args:
            grads: the gradients of a node's outputs.
            recomputed_in: the pass that ran the forward of the gradients' call again, if one did.
        """

    def _on_recomputation(self, task: int, outer: int) -> None:
        """Called when a forward runs again inside of backward pass ``task``, which is ``outer`` itself or nested in it."""

    def _on_refusal_in_forward(self, error: Exception) -> None:
        """Called when a forward that runs again inside of a backward pass cannot be recorded."""
        raise error

    def _on_model_exit(self, forward: Forward, outputs: list[Tensor]) -> None:
        """Hook the uses of parameters in the graph of the tensors that the model returns."""
        uses = self._found_uses(forward, outputs)
        if forward.earlier is not None:
            uses = uses.of_first_run(forward.earlier)
        for use, node in uses.placed:
            self._hook(use, node)
        for value in uses.added_up if uses.placed else ():
            value.node.register_prehook(NodeHook(self._on_value_gradient, value.key))
        for idle, node in uses.idle:
            node.register_prehook(partial(self._on_idle_gradients, idle))

    def _on_empty_batch(self, outputs: list[Tensor]) -> None:
        """The model returned for a batch without samples, of which nothing is recorded."""

    def _found_uses(self, forward: Forward, outputs: list[Tensor]) -> Uses:
        """The uses of parameters that no hooked call accounts for, in the graph of a forward's outputs."""
        try:
            with without_modes() if active_modes() else nullcontext():
                found = self._audit.uses(forward, outputs)
                if self._watches_outputs:
                    place_outputs(found, self._audit.leaves, forward, self.table.ranks)
            for edge, why in self._audit.refused:
                edge.node.register_prehook(partial(self._on_refused_output, edge.output_nr, why))
        except Exception as error:
            raise refusal_of(error, "looking for the samples in the graph of the model's outputs")  # noqa: B904  # it names its cause
        return found

    def _on_refused_output(self, output_nr: int, why: CurvatureError, grads: tuple[Tensor | None, ...]) -> None:
        """Called when a gradient arrives at an output that the loss must not use."""
        grad = grads[output_nr]
        if grad is None or (current := self._pass_under_way(grads)) is None:
            return
        with without_modes():
            if current.error is None and bool(grad.any()):
                current.error = why

    def _hook(self, use: ParameterUse, node: Node) -> None:
        """Have the node of a use call back with its gradients."""
        # The hook runs after the node, as for calls of modules; some rules read what the node leaves behind.
        use.node_hooks = call_with_gradients(node, self._on_use_gradients, use)
        use.forward.node_hooks.append(use.node_hooks)

    # ------------------------------------------------------------------------------------------------ what arrives

    @never_compiled
    def _on_output_gradient(
        self, record: Record, output_nr: int, returned: object, grads: tuple[Tensor | None, ...]
    ) -> None:
        """Called in a backward pass with the gradients of the node that made a module's output."""
        if (grad := grads[output_nr]) is None:
            return
        if record.placement is None:
            if record.idle is not None:
                self._on_idle_gradients(record, (grad,))
            return
        # Every step does this for each gradient. Most gradients belong to the same pass as the one before.
        known = self._known_passes.get(current_graph_task())
        current = (known and known()) or self._pass_under_way(grads, record.forward.recomputed_in)
        if current is not None:
            if (table := record.node_hooks()) is not None and len(table) > 1:
                self._on_node_with_hooks(current, record, table)
            self._within(current, record, current.accumulator.add, record, grad)
        else:
            self._on_unrecorded_gradient(record)

    @never_compiled
    def _on_use_gradients(self, use: ParameterUse, returned: object, grads: tuple[Tensor | None, ...]) -> None:
        """Called with the gradients at a use of a parameter outside of any hooked module's call."""
        known = self._known_passes.get(current_graph_task())
        current = (known and known()) or self._pass_under_way(grads, use.forward.recomputed_in)
        if current is not None:
            if (table := use.node_hooks()) is not None and len(table) > 1:
                self._on_node_with_hooks(current, use, table)
            self._within(current, use, current.accumulator.add_use, use, current_node(), grads)
        else:
            self._on_unrecorded_gradient(use)

    @never_compiled
    def _on_value_gradient(self, key: object, grads: tuple[Tensor | None, ...]) -> None:
        """Called when all gradients of a value that was computed from parameters alone have arrived."""
        current = self._pass_under_way(grads)
        if current is not None and (found := current.accumulator.waiting.get(key)) is not None:
            self._within(current, found.use, current.accumulator.add_waiting_value, key)

    def _on_idle_gradients(self, seen: Record | IdleUse, grads: tuple[Tensor | None, ...]) -> None:
        """Called when gradients arrive where none are expected."""
        current = self._pass_under_way(grads, seen.forward.recomputed_in)
        if current is not None:
            self._within(current, seen, current.accumulator.add_idle, seen, grads)

    def _before_node(self, record: Record, grads: tuple[Tensor | None, ...]) -> None:
        """Called before the node of a module's call runs, if the call is part of no call of the model or is run again."""

    def _on_node_with_hooks(self, current: BackwardPass, seen: Record | ParameterUse, table: HookTable) -> None:
        """Called after a node that makes gradients of parameters has run, if several hooks run after it."""

    def _on_unrecorded_gradient(self, seen: Record | ParameterUse) -> None:
        """Called when a gradient arrives in a pass that is not recorded."""

    def _reach(self, current: BackwardPass, forward: Forward) -> None:
        """Note that this pass has reached a call of the model, whose samples are its own."""
        if current.error is None:
            try:
                self._require_first_pass(current, forward)
                current.error = forward.refusal
            except LifecycleError as error:
                current.error = error
        for reference in forward.node_hooks:
            # Every step does this for every call, so no Python function is called here.
            if (table := reference()) is not None and len(table) > 1:
                self._watch_others(current, table)

    def _watch_others(self, current: BackwardPass, table: HookTable) -> None:
        """Called if several hooks will run after a node that a pass is about to reach."""

    def _within(
        self, current: BackwardPass, seen: Record | ParameterUse | IdleUse | None, add: Callable[..., None], *args: Any
    ) -> None:
        """Add something to a backward pass; an error waits for the end of the pass, so that the user's gradients are complete."""
        if current.error is not None:
            return
        try:
            # Every step does this. A call of the model that this pass has reached belongs to it with all of its layers' calls.
            if seen is not None and seen.forward.last_pass != current.task:
                self._require_first_pass(current, seen)
            if current.special:
                with self.lifecycle.settings():
                    add(*args)
            else:
                add(*args)
        except Exception as error:
            current.error = refusal_of(error, f"taking the gradients of {self._described(seen)} apart by samples")
        except BaseException:  # an interrupt, which ends the pass and whose traceback may outlive it
            self._abandon(current)
            raise

    def _abandon(self, current: BackwardPass) -> None:
        """Called when a pass is broken off: no later gradient belongs to it."""

    def _require_first_pass(self, current: BackwardPass, seen: Record | ParameterUse | IdleUse | Forward) -> None:
        """Raise if another backward pass has already counted the samples that this one reaches."""
        counted = counted_as(seen)
        if counted.last_pass == current.task:
            return
        if counted.last_pass is not None and not self._counts_samples_again(counted.last_pass):
            raise counted_again(seen)
        counted.last_pass = current.task

    def _counts_samples_again(self, last_pass: int) -> bool:
        """Whether samples that an earlier pass has reached count once more."""
        return self.counts_again


def counted_as(seen: Record | ParameterUse | IdleUse | Forward) -> Record | ParameterUse | IdleUse | Forward:
    """The call whose samples must be counted only once.

    A call of the model is one forward, whichever of its layers a pass reaches. Calls of submodules alone may belong to different
    losses, such as a generator's and a discriminator's, so each of them counts on its own.
    """
    if isinstance(seen, Forward) or not seen.forward.in_model_call or seen.forward.recomputed_in is not None:
        return seen
    return seen.forward
