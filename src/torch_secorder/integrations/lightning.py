"""A Lightning callback that logs the Fisher trace of every layer while the model trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_secorder.arguments import (
    By,
    OnError,
    Reduction,
)
from torch_secorder.batch_axis.told import BatchAxis, NSamples, SampleOf
from torch_secorder.errors import ArgumentError, LifecycleError
from torch_secorder.integrations.watching import WatchingCallback, missing, single_process
from torch_secorder.model.selection import Selection

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise missing("Lightning", "lightning") from error


class FisherCallback(WatchingCallback, Callback):  # type: ignore[misc] # Lightning is optional, and Any where it is missing
    r"""Logs ``fisher_trace``, by layer and in total, every k optimizer steps.

    A watched step covers all the batches that it accumulates. With :math:`l_n` the loss of its sample n = 1..N, as
    ``training_step`` returns it,

    .. math:: \mathrm{fisher\_trace}[p] = \frac1N \sum_n \lVert \nabla_p\, l_n \rVert^2

    under ``reduction="mean"``, and the sum under "sum". Lightning divides each batch's loss by
    ``accumulate_grad_batches``, and half precision multiplies it by a scale; both are undone. The callback does not change
    gradients or training, and steps that are not watched cost nothing extra.

    Logged, to all of the trainer's loggers at ``trainer.global_step`` and into ``trainer.callback_metrics``:
    ``fisher_trace`` and ``fisher_trace_stderr`` (of the model), ``fisher_trace/LAYER``, in squared units of the loss per
    unit of the parameter; ``noise_scale`` and ``noise_scale/LAYER``, in samples, if the batches allow to estimate them
    (:func:`~torch_secorder.noise_scale.gradient_noise_scale`).

    Args:
        every: watch the first optimizer step and every ``every``-th after it.
        by: what a LAYER is: "module", "type", None for parameters, or a function from a parameter's name to a group.
        module: the dotted name of the part of the LightningModule that ``training_step`` calls, such as "model"; by
            default the LightningModule itself, for ``self(x)``.
        reduction: how ``training_step``'s loss combines its samples, "mean" or "sum".
        noise_decay: the gradient noise scale's two parts are averaged over the watched steps with weights
            ``noise_decay ** age`` before they are divided, since those of a single step scatter widely. 0 takes each step
            by itself; None logs no noise scale.
        nonfinite: what happens to samples whose gradients are infinite or NaN, as in
            :class:`~torch_secorder.FisherMonitor`. By default that is an error; in float16, whose scaled gradients overflow
            now and then, such a step is left out.
        **options: ``parameters``, ``batch_axis``, ``n_samples`` and ``sample_of`` of :class:`~torch_secorder.FisherMonitor`.

    Attributes:
        history: a dict for each watched step: ``step``, and what was logged.
        report: the latest watched step's table by parameter, as of ``FisherMonitor.report()``.

    Raises:
        ArgumentError: for an invalid argument.
        LifecycleError: when training starts, under manual optimization (whose backward passes may be of different losses
            over the same samples), DeepSpeed, or several processes.
        CurvatureError: in one of its kinds, from the backward pass or when training starts, for whatever can't be exact:
            BatchNorm in training mode, a weight penalty in the loss. It says what to do.

    Example:
        >>> from torch_secorder.integrations.lightning import FisherCallback
        >>> callback = FisherCallback(every=100, module="model")

        and then ``Trainer(callbacks=[callback])``.
    """

    def __init__(
        self,
        every: int = 50,
        *,
        by: By = "module",
        module: str | None = None,
        reduction: Reduction = "mean",
        noise_decay: float | None = 0.9,
        parameters: Selection = "trainable",
        batch_axis: BatchAxis = None,
        n_samples: NSamples = None,
        sample_of: SampleOf = None,
        nonfinite: OnError | None = None,
    ):
        samples = {"batch_axis": batch_axis, "n_samples": n_samples, "sample_of": sample_of}
        super().__init__(every, by, noise_decay, parameters=parameters, nonfinite=nonfinite, **samples)
        self._module, self._reduction = module, reduction

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse settings that cannot give right numbers, before the first step."""
        if not pl_module.automatic_optimization:
            raise LifecycleError(
                "FisherCallback watches automatic optimization: under manual optimization one batch may be differentiated "
                "several times, for several losses; put a FisherMonitor around the backward pass that you mean"
            )
        if "deepspeed" in type(trainer.strategy).__name__.lower():
            raise LifecycleError("FisherCallback does not see DeepSpeed's backward passes: use another strategy")
        single_process(trainer.world_size, "this Trainer")
        scaler = getattr(trainer.precision_plugin, "scaler", None)

        def loss_scale() -> float | Tensor:
            return (1.0 if scaler is None else scaler.get_scale()) / trainer.accumulate_grad_batches

        self._watch.begin(self._part_of(pl_module), self._reduction, loss_scale, scaler is not None)

    def _part_of(self, pl_module: Any) -> Any:
        """The module that is watched."""
        if self._module is None:
            return pl_module
        try:
            return pl_module.get_submodule(self._module)
        except AttributeError as error:
            raise ArgumentError(
                f"module must be the dotted name of a part of the {type(pl_module).__name__}, not {self._module!r}: {error}"
            ) from error

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Watch the step that begins with this batch, if it is due."""
        self._watch.start(trainer.global_step)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Log the watched step, whose batches have all been differentiated."""
        numbers = self._watch.stop(trainer.global_step)
        if numbers is not None:
            trainer.callback_metrics.update(
                {name: torch.tensor(value, dtype=torch.float32, device="cpu") for name, value in numbers.items()}
            )
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=trainer.global_step)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the hooks off the model."""
        self._watch.close()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the hooks off the model."""
        self._watch.close()
