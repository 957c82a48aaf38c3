"""The common part of the callbacks: every k-th optimizer step runs under a monitor and gives a dict of numbers to log."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from torch_secorder.arguments import By, Reduction, described
from torch_secorder.errors import ArgumentError, LifecycleError
from torch_secorder.monitor import FisherMonitor
from torch_secorder.noise_scale import gradient_noise_scale

if TYPE_CHECKING:
    import pandas as pd


class Watch:
    """Puts a monitor around every k-th optimizer step, with all of its backward passes, and around no other step.

    Outside of the watched steps nothing is hooked, so other steps cost nothing extra.

    Args:
        every: watch the first optimizer step and every ``every``-th after it.
        by: the rows that are logged: None, "module", "type" or a function from a parameter's name to a group.
        noise_decay: the decay of earlier watched steps' weights in the gradient noise scale, in [0, 1); None logs no noise scale.
        options: options of :class:`FisherMonitor`.

    Attributes:
        history: a dict for each watched step: ``step``, and what was logged.
        report: the latest watched step's table by parameter; None before the first.
    """

    def __init__(self, every: int, by: By, noise_decay: float | None, **options: Any):
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ArgumentError(f"every must be a positive number of optimizer steps, not {every!r}")
        if not (by in (None, "module", "type") or callable(by)):
            raise ArgumentError(
                f'by must be None, "module", "type" or a function of a parameter\'s name, not {described(by)}'
            )
        if noise_decay is not None and not 0 <= noise_decay < 1:
            raise ArgumentError(
                f"noise_decay must be a number in [0, 1), or None for no noise scale, not {noise_decay!r}"
            )
        self._every, self._by, self._noise_decay, self._options = every, by, noise_decay, options
        self._parts: dict[str, tuple[float, float]] = {}  # running sums of |G|^2 and tr Sigma, by what is logged
        self._monitor: FisherMonitor | None = None
        self._active = False
        self.history: list[dict[str, float]] = []
        self.report: pd.DataFrame | None = None

    @property
    def active(self) -> bool:
        """Whether a step is being watched."""
        return self._active

    def begin(
        self, model: nn.Module, reduction: Reduction, loss_scale: Callable[[], float | Tensor], scaled: bool
    ) -> None:
        """Prepare for training, and refuse at once what could not be right later.

        Args:
            model: the model to watch.
            reduction: how the losses that are differentiated combine samples.
            loss_scale: the factor that these losses were multiplied by.
            scaled: whether that includes a GradScaler's scale, at which gradients may overflow in a step that is then
                skipped. Such a step is not reported.
        """
        self.close()
        self._parts = {}
        options = ({"nonfinite": "skip"} if scaled else {}) | self._options
        self._monitor = FisherMonitor(model, reduction, loss_scale=loss_scale, **options)

    def start(self, step: int) -> None:
        """Enter the monitor if the optimizer step that begins, counted from 0, is to be watched."""
        if self._monitor is not None and not self._active and step % self._every == 0:
            self._monitor.reset()
            self._monitor.__enter__()
            self._active = True

    def stop(self, step: int, convert: Callable[[pd.DataFrame], pd.DataFrame] | None = None) -> dict[str, float] | None:
        """Leave the monitor after the watched step's backward passes.

        Args:
            step: the step's number for the trainer.
            convert: from a report of the losses that were differentiated to a report of the losses that are meant.

        Returns:
            The numbers to log, without those that are NaN (the standard error of one sample). None if no step was
            watched, or if it has no result (no backward pass, or an overflow of scaled gradients).
        """
        monitor, active = self._monitor, self._active
        self.close()
        if monitor is None or not active or not monitor.n_samples or monitor.state_dict()["n_skipped"]:
            return None
        table, rows, total = (monitor.report(by) for by in (None, self._by, lambda name: "model"))
        if convert:
            table, rows, total = (convert(frame) for frame in (table, rows, total))
        self.report = table
        whole = total.iloc[0]
        numbers = {"fisher_trace": whole["fisher_trace"], "fisher_trace_stderr": whole["fisher_trace_stderr"]}
        numbers |= {f"fisher_trace/{name}": value for name, value in rows["fisher_trace"].items()}
        if self._noise_decay is not None:
            numbers |= self._noise_scales(table, self._noise_decay)
        numbers = {name: float(value) for name, value in numbers.items() if value == value}
        self.history.append({"step": step} | numbers)
        return numbers

    def _noise_scales(self, table: pd.DataFrame, decay: float) -> dict[str, float]:
        """The noise scales by group and in total, where they can be estimated.

        The parts are averaged over the watched steps before they are divided, as in McCandlish et al. (2018), appendix
        A.1: those of one step are unbiased but scatter widely.
        """
        try:
            rows, total = (gradient_noise_scale(table, by=by) for by in (self._by, "model"))
        except ArgumentError:  # batches of one sample, or of sizes that can't be compared
            return {}
        found = {"noise_scale": total.iloc[0]} | {f"noise_scale/{name}": row for name, row in rows.iterrows()}
        scales = {}
        for name, row in found.items():
            signal, noise = (decay * part for part in self._parts.get(name, (0.0, 0.0)))
            if row["noise_trace"] == row["noise_trace"]:
                signal, noise = signal + row["true_grad_sq_norm"], noise + row["noise_trace"]
            self._parts[name] = signal, noise
            if signal > 0:
                scales[name] = noise / signal
        return scales

    def close(self) -> None:
        """Take the hooks off the model, if a step is being watched."""
        if self._active and self._monitor is not None:
            self._monitor.__exit__(None, None, None)
        self._active = False


class WatchingCallback:
    """The library's half of a callback, beside the trainer's own base class: a watch, and access to its results.

    Args:
        every: watch the first optimizer step and every ``every``-th after it.
        by: the rows that are logged.
        noise_decay: see :class:`Watch`.
        options: options of :class:`FisherMonitor`. With ``nonfinite=None`` gradients that are not finite are an error; where a
            GradScaler scales the losses, the watched step is left out instead.
    """

    def __init__(self, every: int, by: By, noise_decay: float | None, **options: Any):
        super().__init__()
        given = {name: value for name, value in options.items() if name != "nonfinite" or value is not None}
        self._watch = Watch(every, by, noise_decay, **given)

    @property
    def history(self) -> list[dict[str, float]]:
        """A dict for each watched step: ``step``, and what was logged."""
        return self._watch.history

    @property
    def report(self) -> pd.DataFrame | None:
        """The latest watched step's table by parameter; None before the first."""
        return self._watch.report

    def close(self) -> None:
        """Take the hooks off the model, after training that ended by an error."""
        self._watch.close()


def missing(package: str, extra: str) -> ImportError:
    """The error for a trainer that is not installed."""
    return ImportError(f"this callback is for {package}, which is not installed: pip install 'torch-secorder[{extra}]'")


def single_process(processes: int, where: str) -> None:
    """Raise if there are several processes.

    Raises:
        LifecycleError: with the number of processes.
    """
    if processes > 1:
        raise LifecycleError(
            f"{where} trains in {processes} processes, each of which sees its own samples only, and this callback does not "
            "pool them: watch a run in one process, or use FisherMonitor in a loop of your own and merge"
        )
