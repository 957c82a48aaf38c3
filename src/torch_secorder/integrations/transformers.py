"""A Hugging Face Trainer callback that logs the Fisher trace of every layer while the model trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from torch_secorder.arguments import (
    By,
    OnError,
)
from torch_secorder.batch_axis.told import BatchAxis, NSamples, SampleOf
from torch_secorder.errors import LifecycleError
from torch_secorder.integrations.watching import WatchingCallback, missing, single_process
from torch_secorder.model.selection import Selection

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise missing("the Hugging Face Trainer", "transformers") from error

if TYPE_CHECKING:
    import pandas as pd


class FisherCallback(WatchingCallback, TrainerCallback):  # type: ignore[misc] # transformers is optional, and Any where it is missing
    r"""Logs ``fisher_trace``, by layer and in total, every k optimizer steps.

    The Trainer spreads one optimizer step over micro-batches and differentiates a part of the step's loss in each: a sum
    over the micro-batch's tokens divided by ``num_items_in_batch``, the number of labels in the whole step, or a mean
    divided by the number of micro-batches. Either way the step's loss is the sum of what was differentiated, and a
    sample's part in it is what it adds. So with n = 1..N the samples of all the step's micro-batches, and :math:`s_n`
    what sample n adds to the step's loss,

    .. math:: l_n = N s_n, \qquad \mathrm{fisher\_trace}[p] = \frac1N \sum_n \lVert \nabla_p\, l_n \rVert^2 ,

    exactly. It is the number that one batch of all N samples gives: for a language model, :math:`l_n` is the sum over the
    sample's labels of their cross-entropies, divided by the mean number of labels per sample of the step. Where the Trainer
    averages means over micro-batches of different sizes, as in an epoch's last step with a model that takes no
    ``num_items_in_batch``, it weighs samples of small micro-batches more, and :math:`l_n` carries that weight. A scale for
    half precision is undone. The callback does not change gradients or training, and steps that are not watched cost
    nothing extra.

    Logged: ``fisher_trace`` and ``fisher_trace_stderr`` (of the model), ``fisher_trace/LAYER``, in squared units of the
    loss per unit of the parameter; ``noise_scale`` and ``noise_scale/LAYER``, in samples, where the micro-batches have
    one size of two or more (:func:`~torch_secorder.noise_scale.gradient_noise_scale`).

    Args:
        every: watch the first optimizer step and every ``every``-th after it.
        by: what a LAYER is: "module", "type", None for parameters, or a function from a parameter's name to a group.
        log: a function that gets a dict of the numbers: ``trainer.log`` for TensorBoard and every other place that the Trainer
            reports to. It can be set later, ``callback.log = trainer.log``. By default they go into ``state.log_history``.
        noise_decay: the gradient noise scale's two parts are averaged over the watched steps with weights
            ``noise_decay ** age`` before they are divided, since those of a single step scatter widely. 0 takes each step
            by itself; None logs no noise scale.
        nonfinite: what happens to samples whose gradients are infinite or NaN, as in
            :class:`~torch_secorder.FisherMonitor`. By default that is an error; in float16, whose scaled gradients overflow
            now and then, such a step is left out.
        **options: ``parameters``, ``batch_axis``, ``n_samples`` and ``sample_of`` of :class:`~torch_secorder.FisherMonitor`.

    Attributes:
        history: a dict for each watched step: ``step``, and what was logged.
        report: the latest watched step's table by parameter, as of ``FisherMonitor.report()`` under "mean".
            ``grad_sq_norm`` is the mean over micro-batches of the squared gradient of the mean of their :math:`l_n`, and
            NaN if the micro-batches have different sizes.

    Raises:
        ArgumentError: for an invalid argument.
        LifecycleError: when training starts, with DataParallel, DeepSpeed or several processes.
        CurvatureError: in one of its kinds, from the forward or backward pass or when training starts, for whatever can't be
            exact. It says what to do. If training ends by an error in a watched step, the Trainer tells no callback:
            :meth:`close` takes the hooks off the model, and the next ``train()`` does it too.

    Example:
        >>> from torch_secorder.integrations.transformers import FisherCallback
        >>> callback = FisherCallback(every=100)

        and then ``trainer = Trainer(model, ..., callbacks=[callback])``, ``callback.log = trainer.log``.
    """

    def __init__(
        self,
        every: int = 50,
        *,
        by: By = "module",
        log: Callable[[dict[str, float]], object] | None = None,
        noise_decay: float | None = 0.9,
        parameters: Selection = "trainable",
        batch_axis: BatchAxis = None,
        n_samples: NSamples = None,
        sample_of: SampleOf = None,
        nonfinite: OnError | None = None,
    ):
        samples = {"batch_axis": batch_axis, "n_samples": n_samples, "sample_of": sample_of}
        super().__init__(every, by, noise_decay, parameters=parameters, nonfinite=nonfinite, **samples)
        self._numbers: dict[str, float] | None = None
        self._optimizer: Any = None
        self.log = log

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Refuse settings that cannot give right numbers, before the first step."""
        if args.n_gpu > 1:
            raise LifecycleError(
                f"the Trainer spreads a batch over {args.n_gpu} GPUs with DataParallel, which runs copies of the model: "
                "make one GPU visible (CUDA_VISIBLE_DEVICES=0)"
            )
        if getattr(args, "deepspeed", None):
            raise LifecycleError("FisherCallback does not see DeepSpeed's backward passes: train without it")
        single_process(args.world_size, "this Trainer")
        # "sum": each loss is a part of a sum, whose divisor is known only when the step is over.
        self._watch.begin(model, "sum", self._loss_scale, bool(args.fp16))

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Watch the step that begins with this micro-batch, if it is due."""
        self._optimizer, self._numbers = optimizer, None
        self._watch.start(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the numbers of the watched step, whose micro-batches have all been differentiated."""
        self._numbers = self._watch.stop(state.global_step + 1, _of_means)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the watched step, which the Trainer has counted by now."""
        numbers, self._numbers = self._numbers, None
        if numbers is None:
            return
        if self.log is not None:
            self.log(dict(numbers))
        else:
            state.log_history.append(numbers | {"epoch": state.epoch, "step": state.global_step})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks off the model."""
        self._watch.close()

    def _loss_scale(self) -> float | Tensor:
        scaler = getattr(self._optimizer, "scaler", None)
        return 1.0 if scaler is None else scaler.get_scale()


def _of_means(report: pd.DataFrame) -> pd.DataFrame:
    """From the report of s_n under "sum" to that of l_n = N s_n under "mean": c goes from 1 to 1/N, squares gain N^2."""
    n, passes = report.attrs["n_samples"], report.attrs["n_passes"]
    inverse = report.attrs.get("mean_inverse_batch_size", math.nan)
    means = report.copy()
    means.attrs["reduction"] = "mean"
    for column in ("fisher_trace", "fisher_trace_stderr", "fisher_mean"):
        means[column] = report[column] * n
    # (N / N_b)^2 is one number only for micro-batches of one size, where 1 / N_b is passes / N.
    means["grad_sq_norm"] = report["grad_sq_norm"] * (passes**2 if math.isclose(inverse, passes / n) else math.nan)
    return means
