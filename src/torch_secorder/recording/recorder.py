"""The recorder: hands every gradient that arrives in a hooked model or its graph to the backward pass that it belongs to.

Whatever holds for one driver holds for all and stands here once: no autocast in our own sums, errors that wait until the pass is
over, a call seen twice, and the finish. Who starts a pass, when it ends and what is done then differs between the two kinds of
recorders: ``UserRecorder`` for the user's own passes, ``GraphBackward`` for those that the library makes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from torch_secorder.autograd.engine import current_node
from torch_secorder.autograd.precision import autocast_devices, full_precision
from torch_secorder.batch_axis.knowledge import ModelKnowledge
from torch_secorder.capture.forwards import ForwardTracker
from torch_secorder.capture.module_hooks import ModuleHooks
from torch_secorder.capture.records import Forward, Record
from torch_secorder.errors import LifecycleError, NonFiniteError
from torch_secorder.graph.audit import Audit
from torch_secorder.graph.frontier import ParameterUse
from torch_secorder.model.hooks import HookScope
from torch_secorder.model.parameters import Table
from torch_secorder.per_sample import as_refusal, memory_limit
from torch_secorder.recording.accumulator import PassAccumulator, PassOptions
from torch_secorder.recording.gradient_norms import GradientNorms
from torch_secorder.recording.plan import Plan
from torch_secorder.recording.sample_norms import SampleNorms


@dataclass(eq=False, slots=True, weakref_slot=True)
class BackwardPass:
    """A backward pass that is under way.

    Attributes:
        task: its number.
        accumulator: what it adds up to.
        gradients: the norms of the parameters' own gradients.
        projections: position -> the parameter's own gradient along one direction, in a pass that is checked.
        special: whether our sums take a setting of their own: autocast is on, or memory is memory_limit.
        error: the first that went wrong, which waits for the end of the pass.
    """

    task: int
    accumulator: PassAccumulator
    gradients: GradientNorms
    special: bool
    projections: dict[int, Tensor] = field(default_factory=dict)
    error: Exception | None = None


Check = Callable[[BackwardPass, SampleNorms], None]


class Recorder(HookScope):
    """Hands every gradient that arrives in a hooked model or its graph to the accumulator of its backward pass.

    Args:
        table: what is analysed.
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
    def _pass_under_way(self) -> BackwardPass | None:
        """The pass that a gradient which arrives now belongs to; None for passes that are not recorded."""

    def _on_recomputation(self, task: int) -> None:
        """A forward runs again inside of a backward pass."""

    def _on_model_exit(self, forward: Forward, outputs: Any) -> None:
        """The model returns."""
        self._audit.uses(forward, outputs)

    # ------------------------------------------------------------------------------------------------ what arrives

    def _on_output_gradient(self, record: Record, grad: Tensor) -> None:
        """The gradient of a module's output, inside the backward pass."""
        current = self._pass_under_way()
        if current is not None:
            self._within(current, self._add_record, current, record, grad)

    def _on_use_gradients(self, use: ParameterUse, grads: tuple[Tensor | None, ...]) -> None:
        """The gradients at a use of a parameter outside of any hooked module's call."""
        current = self._pass_under_way()
        if current is not None:
            self._within(current, self._add_use, current, use, current_node(), grads)

    def _add_record(self, current: BackwardPass, record: Record, grad: Tensor) -> None:
        if record.last_pass != current.task:
            self._refuse_second_pass(record, current.task, record.site)
        current.accumulator.add(record, grad)

    def _add_use(self, current: BackwardPass, use: ParameterUse, node: Any, grads: tuple[Tensor | None, ...]) -> None:
        if use.last_pass != current.task:
            self._refuse_second_pass(use, current.task, "a parameter's use outside of its module")
        current.accumulator.add_use(use, node, grads)

    def _refuse_second_pass(self, seen: Record | ParameterUse, task: int, what: object) -> None:
        """Raise if another backward pass has counted these samples already."""
        if seen.last_pass is not None and not self.counts_again:
            raise LifecycleError(
                f"{what}: a second backward pass went through the same forward, whose samples are counted "
                'already; call the model again, or pass repeated_calls="new" to count them as new samples'
            )
        seen.last_pass = task

    def _within(self, current: BackwardPass, action: Callable[..., None], *args: Any) -> None:
        """Do something for a backward pass; what goes wrong must wait for its end, so that the user's gradients are complete."""
        if current.error is not None:
            return
        try:
            if current.special:
                with self._settings():
                    action(*args)
            else:
                action(*args)
        except Exception as error:
            current.error = as_refusal(error)

    # ------------------------------------------------------------------------------------------------ begin and finish

    def _begin(self, task: int, *, keep_inputs: bool = False, checks: bool = False) -> BackwardPass:
        gradients = GradientNorms()
        accumulator = PassAccumulator(
            self.table, self.options, keep_inputs=keep_inputs, checks=checks, gradients=gradients
        )
        return BackwardPass(
            task, accumulator, gradients, bool(autocast_devices()) or self.options.max_memory is not None
        )

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
        known = self._knowledge
        known.warned_of_slow_rules = known.warned_of_slow_rules or current.accumulator.warned()
        return samples


def not_finite(what: str) -> NonFiniteError:
    """The refusal of a batch that isn't finite before it is known where the model has its samples."""
    return NonFiniteError(
        f"{what} are not finite, in the first batch in which it was looked for where the model has its samples, which such a "
        "batch can't show; it is left out as a whole"
    )
