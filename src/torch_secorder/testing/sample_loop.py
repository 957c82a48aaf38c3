"""The loop over single samples in float64, by torch's own autograd only."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from torch_secorder.arguments import Loss, Reduction, called_as, require_choice
from torch_secorder.errors import ArgumentError
from torch_secorder.model.containers import copied, mapped, tensors
from torch_secorder.model.names import plain_name
from torch_secorder.model.parameters import unwrapped
from torch_secorder.model.restore import restorer_of_buffers
from torch_secorder.running.loss_calls import loss_value
from torch_secorder.running.own_loss import loss_function
from torch_secorder.running.trials import LossFunction
from torch_secorder.testing.own_loss_loop import gradients_of_own_loss

# How near the loss with every sample given twice must be to once or twice the loss. In float64 only rounding is left.
NEAR = 1e-6


@called_as("sample_gradients(model, loss_fn, inputs, targets)")
def sample_gradients(
    model: nn.Module,
    loss_fn: Loss,
    inputs: Any,
    targets: Any,
    *,
    names: Sequence[str] | None = None,
    reduction: Reduction | None = None,
    batch_axis: int | Mapping[str, Any] = 0,
) -> dict[str, Tensor]:
    """The gradient of every sample's loss by a plain loop in float64: parameter name -> ``[n, *shape]``.

    Each sample runs alone through a float64 copy of the model. Its output replaces its row in the batch's outputs, which are
    constants, and the loss of these outputs is differentiated, times the number of samples if the loss averages. That is the
    definition of a sample's loss even if the loss is not divided by the number of samples (class weights, ``ignore_index``).
    For a loss that the model computes itself there is no such row. Then each sample's loss alone is differentiated, and weighted
    as in the batch: least squares give the weights with which these gradients sum to that of the batch's loss.

    Args:
        model: the model, which stays as it is; it runs in its current mode.
        loss_fn: from ``(outputs, targets)`` to a scalar; "model" for the loss that the model computes itself.
        inputs: a batch: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        targets: whatever the loss takes.
        names: the names of the parameters; by default of all that require a gradient.
        reduction: whether the loss averages ("mean") or sums ("sum"); by default this is determined by giving it every sample
            twice.
        batch_axis: the axis that counts the samples, for all tensors, or a mapping with the keys "inputs", "outputs" and
            "targets", the last of which defaults to that of the outputs. Tensors without such an axis belong to all samples.

    Returns:
        A float64 tensor for each parameter, zero for samples whose loss does not depend on it.

    Raises:
        ArgumentError: if no axis of the inputs counts samples, if the model or the loss does not run in float64, or if the loss
            neither averages nor sums.

    Example:
        >>> import torch
        >>> from torch_secorder.testing import sample_gradients
        >>> model = torch.nn.Linear(3, 2)
        >>> inputs, targets = torch.randn(8, 3), torch.randint(2, (8,))
        >>> found = sample_gradients(model, torch.nn.CrossEntropyLoss(), inputs, targets)
        >>> found["weight"].shape
        torch.Size([8, 2, 3])
    """
    require_choice("reduction", reduction, (None, *get_args(Reduction)))
    loop = _loop(model, loss_fn, inputs, targets, batch_axis)
    named = {plain_name(name): p for name, p in loop.model.named_parameters()}
    wanted = [name for name, p in named.items() if p.requires_grad] if names is None else list(names)
    if unknown := [name for name in wanted if name not in named]:
        raise ArgumentError(f"{type(loop.model).__name__} has no parameter {unknown[0]!r}")
    for name in wanted:
        named[name].requires_grad_(True)
    return loop.gradients({name: named[name] for name in wanted}, reduction)


def loss_dtype(
    model: nn.Module, loss_fn: Loss, inputs: Any, targets: Any, *, batch_axis: int | Mapping[str, Any] = 0
) -> torch.dtype:
    """The dtype of the loop's loss: float64, except for models that always compute their loss in float32."""
    loop = _loop(model, loss_fn, inputs, targets, batch_axis)
    return loop.loss_dtype()


def float64_copy(model: nn.Module) -> nn.Module:
    """A copy of the model inside of its wrappers, whose parameters and buffers are in float64 or complex128.

    Raises:
        ArgumentError: if the model can't be copied.
    """
    try:
        twin = copy.deepcopy(unwrapped(model))
    except Exception as error:
        raise ArgumentError(
            f"the loop runs in a float64 copy of the model, and {type(model).__name__} can't be copied ({str(error)[:200]}): "
            "give it a copy.deepcopy that works"
        ) from error
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.data = _wide(tensor.data)
    return twin


def run(model: nn.Module, inputs: Any) -> Any:
    """The model's outputs for a tensor, a tuple of positional arguments, or a mapping of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**copied(dict(inputs)))
    inputs = copied(inputs)  # The model may change them in place.
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


class _Loop:
    """A float64 model and its batch."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction, inputs: Any, targets: Any, axes: Mapping[str, int]):
        self.model, self.loss_fn, self.inputs, self.targets, self.axes = model, loss_fn, inputs, targets, axes
        axis = axes["inputs"]
        counted = [x.shape[axis] for x in tensors(inputs) if x.dim() > axis]
        if not counted:
            raise ArgumentError(
                f"no tensor in the inputs has an axis {axis} that counts samples; pass inputs with one, or say batch_axis="
            )
        self.n = counted[0]
        self._restore_buffers = restorer_of_buffers(self.model)
        with torch.no_grad():
            self.outputs = self._run(inputs)

    def loss_dtype(self) -> torch.dtype:
        """The dtype of the whole batch's loss."""
        with torch.no_grad():
            return self._loss(self.outputs, self.targets).dtype

    def gradients(self, named: Mapping[str, Tensor], reduction: str | None) -> dict[str, Tensor]:
        """Parameter name -> every sample's gradient, ``[n, *shape]``."""
        if self._loss_is_inside():
            return gradients_of_own_loss(self._loss_of_samples, self.n, named, reduction)
        factor = self.n if (reduction or self._reduction()) == "mean" else 1
        rows = [self._gradients_of(sample, list(named.values()), factor) for sample in range(self.n)]
        return {name: torch.stack(column) for name, column in zip(named, zip(*rows, strict=True), strict=True)}

    def _gradients_of(self, sample: int, parameters: Sequence[Tensor], factor: int) -> list[Tensor]:
        with torch.enable_grad():
            own = self._run(self._rows("inputs", self.inputs, [sample]))
            loss = factor * self._loss(self._with_row(sample, own), self.targets)
        if not loss.requires_grad:
            return [torch.zeros_like(p) for p in parameters]
        found = torch.autograd.grad(loss, list(parameters), allow_unused=True, retain_graph=True)
        return [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(parameters, found, strict=True)]

    def _with_row(self, sample: int, own: Any) -> Any:
        """The batch's outputs, with one sample's own output in its row."""
        mine = iter(tensors(own))

        def replaced(batch: Tensor) -> Tensor:
            row, where = next(mine), self._sample_axis("outputs", batch)
            if where is None:
                return row
            expected, after = batch.narrow(where, sample, 1), batch.narrow(where, sample + 1, self.n - sample - 1)
            if row.numel() != expected.numel():
                raise ArgumentError(
                    f"sample {sample} alone has an output of shape {tuple(row.shape)}, and one of shape {tuple(expected.shape)} "
                    "in its batch: say with batch_axis= which axis counts the samples"
                )
            return torch.cat([batch.narrow(where, 0, sample), row.reshape(expected.shape), after], where)

        return mapped(replaced, self.outputs)

    def _loss_is_inside(self) -> bool:
        """Whether the loss depends on a number that the model returns: then it is NaN if that number is."""

        def without(x: Tensor) -> Tensor:
            return torch.full_like(x, torch.nan) if x.dim() == 0 and x.is_floating_point() else x

        if not any(x.dim() == 0 for x in tensors(self.outputs)):
            return False
        with torch.no_grad():
            whole = self._loss(self.outputs, self.targets).isfinite()
            return bool(whole & self._loss(mapped(without, self.outputs), self.targets).isnan())

    def _loss_of_samples(self, samples: list[int]) -> Tensor:
        """The loss of some samples that run together, without the others."""
        with torch.enable_grad():
            outputs = self._run(self._rows("inputs", self.inputs, samples))
            return self._loss(outputs, self._rows("targets", self.targets, samples))

    def _reduction(self) -> str:
        """Whether the loss averages or sums."""
        twice = [*range(self.n)] * 2
        with torch.no_grad():
            once = float(self._loss(self.outputs, self.targets))
            rows = self._rows("outputs", self.outputs, twice), self._rows("targets", self.targets, twice)
            both = float(self._loss(*rows))
        for reduction, multiple in (("mean", 1), ("sum", 2)):
            if once and abs(both - multiple * once) <= NEAR * abs(once):
                return reduction
        raise ArgumentError(
            f"the loss is {once:.6g}, and {both:.6g} with every sample given twice, so that it neither averages nor sums: say "
            'reduction="mean" or "sum"'
        )

    def _rows(self, side: str, value: Any, index: list[int]) -> Any:
        """Some samples of every tensor that counts them."""

        def picked(x: Tensor) -> Tensor:
            where = self._sample_axis(side, x)
            return x if where is None else x.index_select(where, torch.tensor(index, device=x.device))

        return mapped(picked, value)

    def _sample_axis(self, side: str, x: Tensor) -> int | None:
        """Where a tensor counts the samples; None if it belongs to all of them."""
        axis = self.axes[side]
        return axis if x.dim() > axis and x.shape[axis] == self.n else None

    def _run(self, inputs: Any) -> Any:
        """The model's outputs. Each run meets the buffers that the first one met, whatever the runs before have written there."""
        self._restore_buffers()
        try:
            return run(self.model, inputs)
        except Exception as error:
            raise ArgumentError(
                f"the float64 copy of {type(self.model).__name__} raised {type(error).__name__} ({str(error)[:200]}): the loop "
                "needs a model that runs in float64, and on one sample of its inputs alone"
            ) from error

    def _loss(self, outputs: Any, targets: Any) -> Tensor:
        try:
            return loss_value(self.loss_fn, mapped(Tensor.clone, outputs), targets)
        except ArgumentError:
            raise
        except Exception as error:
            raise ArgumentError(
                f"the loss raised {type(error).__name__} on outputs in float64 ({str(error)[:200]}): what it keeps (class "
                "weights) must be in a module or a functools.partial, which the loop can copy in float64"
            ) from error


def _loop(model: nn.Module, loss_fn: Loss, inputs: Any, targets: Any, batch_axis: int | Mapping[str, Any]) -> _Loop:
    """Model, loss and batch in float64."""
    loss = in_float64(loss_function(loss_fn))
    return _Loop(float64_copy(model), loss, in_float64(inputs), in_float64(targets), _axes(batch_axis))


def _axes(batch_axis: int | Mapping[str, Any]) -> dict[str, int]:
    """The axis that counts samples, for inputs, outputs and targets."""
    given = (
        batch_axis if isinstance(batch_axis, Mapping) else dict.fromkeys(("inputs", "outputs", "targets"), batch_axis)
    )
    axes = {side: given.get(side, 0) for side in ("inputs", "outputs")}
    axes["targets"] = given.get("targets", axes["outputs"])
    if not all(isinstance(axis, int) and not isinstance(axis, bool) and axis >= 0 for axis in axes.values()):
        raise ArgumentError(
            f"the loop over samples takes one axis each for inputs, outputs and targets, not {batch_axis!r}"
        )
    return axes


def _wide(x: Tensor) -> Tensor:
    """A tensor in float64 or complex128; a tensor of integers is returned as it is."""
    if x.is_complex():
        return x.to(torch.complex128)
    return x.double() if x.is_floating_point() else x


def in_float64(value: Any) -> Any:
    """Tensors, modules, partial functions and containers of tensors in float64."""
    if isinstance(value, nn.Module):
        return float64_copy(value)
    if isinstance(value, functools.partial):
        keywords = {name: in_float64(argument) for name, argument in value.keywords.items()}
        return functools.partial(in_float64(value.func), *map(in_float64, value.args), **keywords)
    return mapped(_wide, value)
