"""How a backward pass begins and ends, and the settings under which the library computes during it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext

import torch
from torch import Tensor

from torch_secorder.autograd.engine import active_modes, without_modes
from torch_secorder.autograd.precision import autocast_devices, full_precision
from torch_secorder.batch_axis.knowledge import ModelKnowledge
from torch_secorder.model.parameters import Table
from torch_secorder.per_sample import memory_limit
from torch_secorder.recording.accumulator import PassAccumulator
from torch_secorder.recording.backward_pass import BackwardPass, Check
from torch_secorder.recording.doubts import Doubts, kept_bytes
from torch_secorder.recording.foreign_errors import refusal_of
from torch_secorder.recording.gradient_norms import GradientNorms
from torch_secorder.recording.options import PassOptions
from torch_secorder.recording.sample_norms import SampleNorms


class PassLifecycle:
    """Begins and finishes the backward passes of one recorder.

    Args:
        table: what is analyzed.
        knowledge: what is known about the model already.
        options: what each pass collects.
        of_user: whether the passes are the user's. On an accelerator, the results of such a pass and its doubts go to the host in
            one copy when it is over. Autograd never records the library's sums in such a pass.
    """

    def __init__(self, table: Table, knowledge: ModelKnowledge, options: PassOptions, *, of_user: bool):
        self._table, self._knowledge, self._options, self._of_user = table, knowledge, options, of_user
        self._on_accelerator = False  # whether doubts are collected, since the host would have to wait for each answer

    def note_devices(self) -> None:
        """Note where the parameters are; they stay there as long as passes are recorded."""
        self._on_accelerator = self._of_user and bool({leaf.device.type for leaf in self._table.leaves} - {"cpu"})

    def begin(self, task: int, *, keep_inputs: bool = False, checks: bool = False) -> BackwardPass:
        """A backward pass that has just begun.

        Args:
            task: its number.
            keep_inputs: whether the records keep their inputs, for another backward pass through the same forward.
            checks: whether captured gradients are also projected on one direction each, to be compared with autograd's.
        """
        sees_all = active_modes() > 0
        gradients = GradientNorms(waits=not sees_all)
        doubts = None
        if self._on_accelerator:
            doubts = Doubts(self._table.names, self._knowledge.cancelled, kept_bytes(self._options.max_memory))
        in_autocast = bool(autocast_devices())
        accumulator = PassAccumulator(
            *(self._table, self._options),
            keep_inputs=keep_inputs,
            checks=checks,
            gradients=gradients,
            doubts=doubts,
            half=in_autocast,
        )
        special = in_autocast or self._options.max_memory is not None or sees_all
        special = special or (self._of_user and torch.is_grad_enabled())  # Autograd would record the library's sums.
        return BackwardPass(task, accumulator, gradients, special)

    def settings(self) -> ExitStack:
        """A block with sums in full precision, even under autocast, within the memory limit and hidden from the user's modes."""
        stack = full_precision()
        stack.enter_context(without_modes())
        limit = self._options.max_memory
        if limit is not None and self._on_accelerator:
            limit -= kept_bytes(limit)
        stack.enter_context(memory_limit(limit))
        if self._of_user:
            stack.enter_context(torch.no_grad())
        return stack

    def finish(
        self,
        current: BackwardPass,
        nonfinite: str = "raise",
        checks: Sequence[Check] = (),
        gradient_norms: Tensor | None = None,
    ) -> SampleNorms:
        """The squared norms that a backward pass found, if nothing went wrong and they pass the checks.

        Args:
            current: the pass.
            nonfinite: "skip" or "raise", for samples that are not finite.
            checks: the checks to pass.
            gradient_norms: the norms of the parameters' gradients, which go to the host together with the results.

        Raises:
            CurvatureError: the first error of the pass, or the finding of a check.
        """
        if current.error is not None:
            raise current.error
        try:
            with self.settings() if current.special else nullcontext():
                samples = current.accumulator.finish(nonfinite, gradient_norms)
                for check in checks:
                    check(current, samples)
        except Exception as error:
            raise refusal_of(error, "taking the gradients of this batch apart by samples")  # noqa: B904  # it names its cause
        if current.accumulator.slow.elements and not self._knowledge.warned_of_slow_rules:
            self._knowledge.warned_of_slow_rules = current.accumulator.slow.warned()
        return samples
