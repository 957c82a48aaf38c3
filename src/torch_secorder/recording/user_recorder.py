"""The user's own backward passes: which are of the samples, when they begin and end, and what waits for their end."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from threading import RLock, get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from torch_secorder.autograd.compiled import never_compiled
from torch_secorder.autograd.engine import (
    LIBRARY_PASSES,
    LIBRARY_THREADS,
    accumulates_gradient_of,
    after_backward,
    any_vmapped,
    current_graph_task,
    current_node,
    is_library_pass,
    keeps_graph,
    leaf_of,
    raise_after_backward,
)
from torch_secorder.autograd.hooks import gradient_hooks
from torch_secorder.autograd.node_hooks import HookTable, NodeHook, ReturnsWatch, has_others, hooks_before
from torch_secorder.autograd.second_derivatives import GradientGraphWatch
from torch_secorder.autograd.tensor_hooks import are_last, put_last
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.batch_axis.samples import of_one
from torch_secorder.capture.records import Forward, Record
from torch_secorder.errors import LifecycleError, UnsupportedError
from torch_secorder.graph.broadcast import broadcasting_node
from torch_secorder.graph.frontier import ParameterUse
from torch_secorder.model.parameters import named_modules, parameters_by_name
from torch_secorder.model.ranks import full_tensor, is_dtensor
from torch_secorder.per_sample import as_refusal
from torch_secorder.recording.backward_pass import BackwardPass, changed_by_hook, counted_again, replaced, vmapped_pass
from torch_secorder.recording.changed_gradients import changes_parameters
from torch_secorder.recording.history import History
from torch_secorder.recording.passes import UserPasses
from torch_secorder.recording.quantities import QUANTITIES
from torch_secorder.recording.recorder import Recorder, counted_as
from torch_secorder.recording.watched_passes import WatchedPasses
from torch_secorder.recording.whole_passes import WholePasses


class UserRecorder(Recorder):
    """Records the user's backward passes, each from its first gradient to the engine's word that it is over.

    Args:
        history: counts what happens, for messages.
        on_pass: called with each pass that is over; what it raises is raised at the end of that backward pass.
        checks_next: says of the kind of the latest graph whether the next pass also notes its gradients along one direction, to
            compare sums.
        options: as for :class:`Recorder`.

    Attributes:
        waiting: refusals of passes at whose end nothing could be raised, for the end of the block.
    """

    collects_doubts = True

    def __init__(
        self,
        *args: Any,
        history: History,
        on_pass: Callable[[BackwardPass], None],
        checks_next: Callable[[int], bool] = lambda fingerprint: False,
        every: int = 1,
        **options: Any,
    ):
        super().__init__(*args, every=every, **options)
        self._on_pass, self._checks_next, self._every = on_pass, checks_next, every
        self._history, history.every = history, every
        history.blocks += 1
        can_count = any(leaf.requires_grad for leaf in self.table.leaves) if every > 1 else False
        self._watched = WatchedPasses(every if can_count else 1, self._count_passes, super()._attach, super()._detach)
        self._latest: weakref.ref[BackwardPass] | None = None  # the pass that something arrived in last
        self._refused = -1  # the latest pass that is not watched and reached samples which were counted
        self.counts_again = self.options.repeated_calls == "new"
        watches = any(QUANTITIES[name].watches_outputs for name in self.options.quantities)
        leaves = list(self._audit.leaves)
        every_one = len(leaves) == len(self.table) > 0
        self._passes = UserPasses(leaves, every_one, self.plan.model, watches_outputs=watches)
        self._whole = WholePasses(self.table.names, self._audit.leaves)
        # Position -> the hooks on the node that accumulates the parameter's gradient.
        self._before_accumulation = {position: hooks_before(node) for node, position in self._audit.leaves.items()}
        self._gradient_graphs: dict[int, GradientGraphWatch] = {}  # of ignored passes with create_graph=True
        self._counting = RLock()  # several threads may train the model
        self._outputs: list[tuple[weakref.ref[Tensor], Placement]] = []
        self._looks_at_column = True  # until one pass has gone through an output [n, 1]
        self._column: Forward | None = None
        self.waiting: list[Exception] = []
        self._parameters = parameters_by_name(self.plan.modules)  # as they are on entry
        # The leaves of tensors that are not analyzed, and are none of the model's new parameters.
        self._known_leaves: set[Node] = set()

    @property
    def outputs(self) -> list[tuple[Tensor, Placement]]:
        """The outputs of the model's latest call that have samples, are still there and can be differentiated."""
        alive = [(reference(), placement) for reference, placement in self._outputs]
        return [(x, placement) for x, placement in alive if x is not None and x.requires_grad]

    def outputs_to_verify(self) -> list[tuple[Tensor, Placement]]:
        """The same, for a pass that is still to come.

        Raises:
            LifecycleError: if the model was not called, its pass is over, or the outputs are gone.
        """
        if self.forwards.latest.last_pass is not None and not self.counts_again:
            raise LifecycleError(
                "verify goes before backward(), and the backward pass through the model's latest call is over: call the model "
                "again, then verify(loss), then loss.backward()"
            )
        outputs, seen = self.outputs, [reference() for reference, _ in self._outputs]
        if not seen or (not outputs and any(x is not None for x in seen)):
            raise LifecycleError(
                "verify: the model was not called with a gradient in this block: call it inside, outside of torch.no_grad()"
            )
        if not outputs:
            raise LifecycleError(
                "verify: the model's outputs are gone: write outputs = model(inputs), and on the next line loss = "
                "loss_fn(outputs, targets), so that they are there until verify(loss) has seen them"
            )
        return outputs

    @property
    def n(self) -> int | None:
        """How many samples the model's latest call has."""
        return self.forwards.latest.n

    def _attach(self) -> None:
        self._watched.enter()
        super()._attach()

    def _detach(self) -> None:
        self._watched.leave()
        self._passes.clear()
        for watch in self._gradient_graphs.values():
            watch.close()
        self._gradient_graphs.clear()
        self._known_leaves.clear()
        super()._detach()

    def _count_passes(self) -> None:
        """Compiled code is called inside the block: from now on backward passes are counted, and not calls of the model."""
        self.forwards.every = 1

    # ------------------------------------------------------------------------------------------------ what happens in forward

    def _on_model_exit(self, forward: Forward, outputs: list[Tensor]) -> None:
        if self._passes.under_way:
            self._passes.forget_broken_off()
        super()._on_model_exit(forward, outputs)
        self._outputs = []
        for x, placement in zip(outputs, forward.placements, strict=True):
            where = placement or (
                of_one(x, 0) if forward.n == 1 else None
            )  # The output of one sample may have no axis left.
            if where is not None:
                self._outputs.append((weakref.ref(x), where))
        for node in self._audit.other_leaves:
            if node not in self._known_leaves and isinstance(variable := leaf_of(node), nn.Parameter):
                self._require_known(forward, node, variable)
        nodes = {x.grad_fn for x in outputs if x.grad_fn is not None}
        if nodes:
            self._history.forwards += 1
        else:
            self._history.without_gradient += 1
        if self._looks_at_column:
            self._column = forward if len(outputs) == 1 and outputs[0].shape == (forward.n, 1) else None
        for node in nodes:
            node.register_prehook(partial(self._on_outputs_gradient, forward))

    def _require_known(self, forward: Forward, node: Node, variable: nn.Parameter) -> None:
        """Have the pass through a forward refused if it used a parameter that was put into the model inside of the block."""
        assert self.plan.model is not None
        now = parameters_by_name(named_modules(self.plan.model))
        others = {name: p for name, p in now.items() if self._parameters.get(name) is not p}
        others = {name: p for name, p in others.items() if not is_dtensor(self._parameters.get(name))}
        if any(p is variable for p in others.values()):
            forward.refusal = replaced(list(others))
            return
        self._known_leaves.add(node)

    def _on_recomputation(self, task: int, outer: int) -> None:
        if self._passes.of(task) is not None:
            return
        if task not in self._passes.ignored and not self._is_of_samples():
            self._passes.ignore(task)  # A pass that begins inside of it may be of the samples.
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
        current = self._pass_under_way(grads)
        if current is not None:
            self._reach(current, forward)
            if (node := current_node()) is not None:
                current.roots.append(node)
            if self._column is forward:
                self._look_at_column(current, forward)
        elif (reached := self._passes.ignored.get(current_graph_task())) is not None:
            reached.append(forward)
        elif not self.forwards.active:
            self._history.late_passes += 1

    def _look_at_column(self, current: BackwardPass, forward: Forward) -> None:
        """Note whether the loss compares each of the outputs ``[n, 1]`` with all targets."""
        outputs, n = current_node(), forward.n
        assert outputs is not None
        assert n is not None
        found = broadcasting_node(outputs, n)
        current.broadcast = None if found is None else (n, found.name())
        self._looks_at_column, self._column = False, None

    def _reach(self, current: BackwardPass, forward: Forward) -> None:
        """The samples of a call of the model are those of this pass."""
        if current.error is None:
            try:
                self._require_first_pass(current, forward)
                current.error = forward.refusal
            except LifecycleError as error:
                current.error = error
        for reference in forward.node_hooks:
            # Every step does this for every call, so that no function of Python's is called.
            if (table := reference()) is not None and len(table) > 1:
                self._watch_others(current, table)

    def _watch_others(self, current: BackwardPass, table: HookTable) -> None:
        """Notice what hooks of the user's change of what a node is about to return."""
        if has_others(table):
            ReturnsWatch(table, partial(self._on_changed_gradients, current, self._seen_at(table)))

    def _before_node(self, record: Record, grads: tuple[Tensor | None, ...]) -> None:
        if (table := record.node_hooks()) is None or len(table) == 1:
            return
        current = self._pass_under_way(grads, record.forward.recomputed_in)
        if current is not None:
            self._watch_others(current, table)

    def _seen_at(self, table: HookTable) -> list[Record | ParameterUse]:
        """What this recorder takes apart by samples at a node, by the hooks that run after it."""
        hooks = [hook for hook in table.values() if isinstance(hook, NodeHook)]
        return [hook.args[0] for hook in hooks if getattr(hook.func, "__self__", None) is self]

    def _on_changed_gradients(
        self, current: BackwardPass, seen: list[Record | ParameterUse], changed: list[int]
    ) -> None:
        """Hooks of the user's have changed what a node returned for some of its inputs."""
        for one in seen:
            if current.error is None and changes_parameters(current_node(), one, changed, self.table.leaves):
                current.error = changed_by_hook(self._described(one))

    def _on_node_with_hooks(self, current: BackwardPass, seen: Record | ParameterUse, table: HookTable) -> None:
        if current.error is None and has_others(table) and not ReturnsWatch.encloses(table):
            current.error = changed_by_hook(self._described(seen))

    @never_compiled
    def on_parameter_gradient(self, position: int, grad: Tensor) -> None:
        """The gradient of a parameter, as this backward pass adds it to ``.grad``."""
        # Re-entrant checkpointing has backward passes inside of a pass that is skipped, which open none of ours.
        if self.forwards.skipped_passes and not self._passes.under_way:
            return
        current = self._pass_under_way((grad,))
        if current is None:
            if self._watched.resting:
                self._watched.note_gradient()
            return
        leaf = self.table.leaves[position]
        if current.task != current_graph_task() and not accumulates_gradient_of(get_gradient_edge(leaf).node):
            return  # A function's backward asked for it, and may return it to this pass.
        alone = len(gradient_hooks(leaf) or ()) <= 1
        # A hook that was put on in this very pass comes after ours, and so does one on the node that accumulates the gradient.
        as_added = (alone or are_last(leaf)) and not self._before_accumulation.get(position)
        if type(grad) is Tensor and not current.accumulator.checks:
            # Every step does this for every parameter, most of which are small.
            if not (as_added and current.error is None and current.gradients.keep(position, grad)):
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

    def _on_unrecorded_gradient(self, seen: Record | ParameterUse) -> None:
        task, counted = current_graph_task(), counted_as(seen)
        if not self._watched.resting or self.counts_again or counted.last_pass in (None, task) or is_library_pass(task):
            return
        if task != self._refused and self._is_of_samples():
            self._refused = counted.last_pass = task
            raise_after_backward(counted_again(seen))

    def _on_gradient_graph(self, grads: tuple[Tensor | None, ...]) -> None:
        """A backward pass goes through the graph of gradients that another one made."""
        current = self._pass_under_way(grads)
        if current is not None and current.error is None:
            current.error = UnsupportedError(
                "the backward pass goes through the graph of a gradient (create_graph=True: a gradient penalty, forces, the "
                "residual of an equation), where parameters are used in ways that belong to no layer's call: differentiate such "
                "a loss outside of the monitor's block; the batch is left out"
            )

    def require_whole(self, current: BackwardPass, positions: Sequence[int]) -> None:
        """Have a pass refused, at its end, that was asked for the gradients of some parameters only."""
        if current.error is None and current_graph_task() == current.task:
            current.error = self._whole.refusal(self._audit.fingerprint, current.roots, positions)
        current.roots.clear()

    # ------------------------------------------------------------------------------------------------ which pass it is

    def _settings(self) -> ExitStack:
        stack = super()._settings()
        stack.enter_context(torch.no_grad())
        return stack

    def _abandon(self, current: BackwardPass) -> None:
        self._passes.close(current)

    def _counts_samples_again(self, last_pass: int) -> bool:
        return super()._counts_samples_again(last_pass) or self._passes.is_broken_off(last_pass)

    def _pass_under_way(self, grads: Sequence[Tensor | None], recomputed_in: int | None = None) -> BackwardPass | None:
        task = current_graph_task()
        if not self.forwards.active or task in LIBRARY_PASSES or get_ident() in LIBRARY_THREADS:
            return None
        if task in self._passes.ignored:
            self._watch_gradient_graph(task)
            return None
        current = self._latest() if self._latest is not None else None
        # Every step asks this for each gradient. Most gradients belong to the pass of the one before.
        if current is None or current.task != task or current.is_over:
            current = self._passes.of(task) if self._passes.under_way else None
            current = current or self._begun(task, grads, recomputed_in)
            self._latest = None if current is None else weakref.ref(current)
        skipped = self.forwards.skipped_passes
        if skipped and task in skipped and current is not None and current.error is None:
            current.error = LifecycleError(
                f"one backward pass reached a call of the model that every={self._every} passed over, and one that it did not: "
                "enter and leave the monitor's block for the steps to watch instead"
            )
        return current

    def _begun(self, task: int, grads: Sequence[Tensor | None], recomputed_in: int | None) -> BackwardPass | None:
        """A pass that something arrives in for the first time, or the one around it; None if it is none of the samples."""
        of_samples = self._is_of_samples()
        if of_samples and not any_vmapped(grads):
            number = self._passes.nest(task, recomputed_in)
            current = self._passes.of(number) if number != task else None
            current = current or self._open(number)
            for forward in self._passes.ignored.get(number, ()):
                self._reach(current, forward)
            return current
        if of_samples:
            self._let_wait(vmapped_pass())
        self._history.other_passes += 1
        self._passes.ignore(task)
        self._watch_gradient_graph(task)
        return None

    def _is_of_samples(self) -> bool:
        try:
            return self._passes.is_of_samples()
        except UnsupportedError as error:
            self._let_wait(error)
            return False

    def _let_wait(self, error: Exception) -> None:
        self.waiting.append(error)
        self._history.refuse(error)

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
        # Beside the watched calls, a pass may reach calls of compiled code, which no hook has seen; the sums show it.
        checks = self._checks_next(self._audit.kind) or self._watched.are_counted
        # Through a graph that is kept, the pass may be made again, should an exception break it off.
        current = self._begin(task, keep_inputs=self.counts_again or keeps_graph(), checks=checks)
        current.special = current.special or torch.is_grad_enabled()  # Autograd would follow our sums.
        self._passes.under_way[current.task] = current
        self._passes.unfinished.add(current.task)
        for leaf in self.table.leaves:
            if len(gradient_hooks(leaf) or ()) > 1:
                put_last(leaf)
        # Only autograd keeps the pass alive: one that an exception breaks off is gone with its traceback.
        after_backward(partial(self._close, current))
        return current

    @never_compiled
    def _close(self, current: BackwardPass) -> None:
        """A backward pass is over: hand it on, or raise why not. The user's gradients are complete by now."""
        self._passes.unfinished.discard(current.task)
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
            self._history.refuse(error)
            raise_after_backward(as_refusal(error))
        if self._watched.are_counted:
            self._watched.pass_over()
