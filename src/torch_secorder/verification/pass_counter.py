"""The decision over each backward pass of a monitor's user: its samples count, or it is left out."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

from torch import Tensor

from torch_secorder.arguments import loss_scale_value
from torch_secorder.autograd.engine import without_modes
from torch_secorder.batch_axis.knowledge import KindSchedule
from torch_secorder.errors import (
    ArgumentError,
    CurvatureError,
    ReductionWarning,
    SkippedPassWarning,
    warn_at_users_line,
)
from torch_secorder.per_sample import as_refusal
from torch_secorder.recording.backward_pass import BackwardPass, Check
from torch_secorder.recording.history import History
from torch_secorder.recording.monitoring import MonitorOptions, WatchedModel
from torch_secorder.recording.sample_norms import SampleNorms
from torch_secorder.recording.user_recorder import UserRecorder
from torch_secorder.results.statistics import Statistics
from torch_secorder.verification.backward_passes import (
    is_of_nothing,
    require_sound_pass,
    require_trainable,
    unaccounted,
    without_a_call,
)
from torch_secorder.verification.expected_norms import ExpectedNorms
from torch_secorder.verification.loss_warnings import warn_of_broadcast, warn_of_reduction


class PassCounter:
    """Adds the samples of each backward pass to a monitor's statistics, or refuses the pass.

    Args:
        options: the monitor's arguments.
        watched: the model; None for a monitor that was loaded without one.
        statistics: what the samples are added to.
        history: counts what happens, for messages.

    Attributes:
        checks: the schedule of the sum checks, for this kind of block.
        expected: what the next pass has to find for some samples, if it is to be verified.
    """

    def __init__(self, options: MonitorOptions, watched: WatchedModel | None, statistics: Statistics, history: History):
        self._options, self._watched, self._statistics, self._history = options, watched, statistics, history
        self.checks = KindSchedule()
        self.expected: list[ExpectedNorms] = []
        self._warned_of: set[type[Exception]] = set()

    def on_pass(self, recorder: UserRecorder, current: BackwardPass) -> None:
        """Called at the end of a backward pass: count it, or refuse it."""
        try:
            self._count(recorder, current)
        except Exception as error:
            self.refuse(as_refusal(error))

    def refuse(self, error: Exception) -> None:
        """Raise the error for which a pass is left out, or note that it was left out."""
        ours = isinstance(error, CurvatureError) and not isinstance(error, ArgumentError)
        self.checks.restart()
        if self._options.on_refusal == "raise" or not ours:
            raise error
        self._history.refuse(error)
        self._statistics.skipped_passes += 1
        if type(error) not in self._warned_of:
            self._warned_of.add(type(error))
            warn_at_users_line(f"a backward pass was left out ({type(error).__name__}): {error}", SkippedPassWarning)

    def _count(self, recorder: UserRecorder, current: BackwardPass) -> None:
        """Count a backward pass, or raise the reason why not."""
        with without_modes() if current.special else nullcontext():
            names, (positions, norms) = self._statistics.names, current.gradients.all()
        if current.error is None and current.accumulator.is_empty and not positions:
            return
        if len(positions) < recorder.with_gradient:
            recorder.require_whole(current, positions)
        loss_scale = self._options.loss_scale
        if not isinstance(loss_scale, float):  # A function may count its calls, so it is called once for each pass.
            loss_scale = loss_scale_value(loss_scale)
        if current.error is None and current.accumulator.is_empty:
            if current.is_of_empty_batch and is_of_nothing(norms):
                return
            raise self._unexplained([names[position] for position in positions], norms)
        assert self._watched is not None  # A block has a model.
        checks: list[Check] = [partial(require_sound_pass, self._watched.model, self._watched.table, positions, norms)]
        if self._options.parameters == "trainable":
            checks.append(partial(require_trainable, self._watched.table))
        expected, self.expected = self.expected, []
        checks += map(partial(partial, _require_expected, names), expected)
        samples = recorder.lifecycle.finish(current, self._options.nonfinite, checks, norms)
        if current.broadcast is not None:
            warn_of_broadcast(*current.broadcast)
        if current.loss_reduction not in (None, self._options.reduction):
            self._doubt_reduction(current.loss_reduction, samples.batch, loss_scale)
        scale = (samples.batch / loss_scale if self._options.reduction == "mean" else 1 / loss_scale) ** 2
        with without_modes() if current.special else nullcontext():
            assert samples.gradient_norms is not None
            self._statistics.update(samples, (positions, samples.gradient_norms), scale, loss_scale)

    def _unexplained(self, names: list[str], norms: Tensor) -> CurvatureError:
        """The refusal of a pass in which nothing was captured."""
        history = self._history
        if self._options.every == 1 and not history.forwards + history.without_gradient + history.without_samples:
            return without_a_call(history.model, names, norms)
        return unaccounted(names, norms)

    def _doubt_reduction(self, found: str, n: int, loss_scale: float | Tensor) -> None:
        """Warn once of a loss that shows another reduction than the monitor was told. A scale may be meant to undo that."""
        if n > 1 and ReductionWarning not in self._warned_of and loss_scale == 1:
            self._warned_of.add(ReductionWarning)
            warn_of_reduction(found, self._options.reduction, n)


def _require_expected(names: list[str], expected: ExpectedNorms, current: BackwardPass, samples: SampleNorms) -> None:
    """Raise unless a sample has the norms of plain autograd."""
    if not samples.skipped:
        expected.require(names, samples.squared_norms)
