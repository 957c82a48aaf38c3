"""A recorder of the user's own backward passes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from threading import RLock
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from torch_secorder.autograd.engine import (
    after_backward,
    current_graph_task,
    in_search_pass,
    is_library_pass,
    raise_after_backward,
)
from torch_secorder.autograd.hooks import hook_count
from torch_secorder.capture.records import Forward, Record
from torch_secorder.errors import LifecycleError
from torch_secorder.graph.frontier import ParameterUse
from torch_secorder.model.containers import tensors
from torch_secorder.model.ranks import full_tensor
from torch_secorder.per_sample import as_refusal, sign_vectors
from torch_secorder.recording.recorder import BackwardPass, Recorder


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
        self.counts_again = self.options.repeated_calls == "new"
        self._passes: WeakValueDictionary[int, BackwardPass] = WeakValueDictionary()
        self._outer_of: dict[int, int] = {}  # a backward pass inside of another one (checkpointing) -> the outer one
        self._counting = RLock()  # several threads may train the model
        self._outputs: list[weakref.ref[Tensor]] = []

    @property
    def outputs(self) -> list[Tensor]:
        """The outputs of the model's latest call that are still there and can be differentiated."""
        return [x for reference in self._outputs if (x := reference()) is not None and x.requires_grad]

    def _detach(self) -> None:
        self._passes.clear()
        self._outer_of.clear()
        super()._detach()

    def _on_model_exit(self, forward: Forward, outputs: Any) -> None:
        super()._on_model_exit(forward, outputs)
        self._outputs = [weakref.ref(x) for x in tensors(outputs)]

    def _on_recomputation(self, task: int) -> None:
        self._pass_of(task)

    def _on_output_gradient(self, record: Record, grad: Tensor) -> None:
        outer = record.forward.recomputed_in
        if outer is not None and outer != (task := current_graph_task()):
            self._outer_of[task] = outer
        super()._on_output_gradient(record, grad)

    def _on_use_gradients(self, use: ParameterUse, grads: tuple[Tensor | None, ...]) -> None:
        if self.forwards.active and not in_search_pass():
            super()._on_use_gradients(use, grads)

    def on_parameter_gradient(self, position: int, grad: Tensor) -> None:
        """The gradient of a parameter, as this backward pass adds it to ``.grad``."""
        # Re-entrant checkpointing has backward passes inside of one that is skipped; those open none of ours.
        if self.forwards.skipped_passes and not self._passes:
            return
        current = self._pass_under_way()
        if current is not None:
            self._within(current, self._add_gradient, current, position, grad)

    def _add_gradient(self, current: BackwardPass, position: int, grad: Tensor) -> None:
        grad, leaf = full_tensor(grad), self.table.leaves[position]
        # What a hook of the user's makes of a gradient is not in its factors, and not ours to check.
        as_computed = hook_count(leaf) <= 1
        current.gradients.add(position, grad, as_computed=as_computed)
        if current.accumulator.checks and as_computed and not grad.is_sparse:
            left, right = sign_vectors(grad.shape, grad)
            along = left @ (grad.detach().reshape(len(left), -1) @ right)
            current.projections[position] = current.projections.get(position, 0) + along

    def _pass_under_way(self) -> BackwardPass | None:
        task = current_graph_task()
        if is_library_pass(task):
            return None
        current = self._pass_of(self._outer_of.get(task, task))
        if self.forwards.skipped_passes and task in self.forwards.skipped_passes and current.error is None:
            current.error = LifecycleError(
                f"one backward pass reached a call of the model that every={self._every} passed over, and one that it did not: "
                "enter and leave the monitor's block for the steps to watch instead"
            )
        return current

    def _pass_of(self, task: int) -> BackwardPass:
        current = self._passes.get(task)
        if current is None:
            current = self._passes[task] = self._begin(task, keep_inputs=self.counts_again, checks=self._checks_next())
            # Only autograd keeps the pass alive: one that an exception breaks off is gone with its traceback.
            after_backward(partial(self._close, current))
        return current

    def _close(self, current: BackwardPass) -> None:
        """A backward pass is over: hand it on, or raise why not. The user's gradients are complete by now."""
        if self._passes.pop(current.task, None) is None or not self.forwards.active:
            return
        if self._outer_of:
            self._outer_of = {inner: outer for inner, outer in self._outer_of.items() if outer != current.task}
        self.forwards.forget_outside_calls()
        try:
            with torch.no_grad(), self._counting:
                self._on_pass(current)
        except Exception as error:
            raise_after_backward(as_refusal(error))
