"""The model as plain autograd differentiates it: quantized weights are replaced by the numbers that their codes stand for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torch_secorder.autograd.engine import call_model
from torch_secorder.model.containers import tensors
from torch_secorder.model.hooks import restoring
from torch_secorder.model.parameters import ParameterTable, numpy_of_frozen
from torch_secorder.model.restore import restoring_state
from torch_secorder.per_sample import at_least_float32
from torch_secorder.verification.tolerances import DEQUANTIZED_OUTPUTS

# At most this many numbers are changed to evaluate the model at other parameters, which takes little memory beside a step.
FEW_NUMBERS = 2**20
# The size that stands in for a parameter of zeros only, such as biases and last layers at the start.
SIZE_OF_ZERO = 0.1


class DifferentiableModel:
    """The model, with a leaf for every parameter that can get a gradient.

    Args:
        model: the model.
        table: its analyzed parameters.
        inputs: a batch on which quantized weights are replaced for a trial. If that changes the outputs by more than rounding,
            such weights get no leaf, and a warning says so.

    Attributes:
        positions: the parameters that have a leaf, by their position in the table.
        leaves: the leaves, in the same order.
    """

    def __init__(self, model: nn.Module, table: ParameterTable, inputs: Any):
        leaves = {position: leaf for position, leaf in enumerate(table.leaves) if position not in table.quantized}
        self._model, self._table, self._call = model, table, cast("Callable[..., Any]", model)
        if table.quantized:
            weights = _dequantized(table)
            call = partial(_called_with, model, _by_name(model, table, weights))
            if weights and _agree(model, call, inputs):
                self._call, leaves = call, leaves | weights
            else:
                _warn([table.names[position] for position in sorted(table.quantized)])
        self.positions = sorted(leaves)
        self.leaves = [leaves[position] for position in self.positions]

    def elsewhere(self, step: float, seed: int) -> DifferentiableModel:
        """The same model, with the same leaves, at other values of its small parameters.

        Args:
            step: how far each parameter is moved in a random direction, in units of its own size.
            seed: the seed of the direction.
        """
        generator = torch.Generator().manual_seed(seed)
        moved = {position: _moved(leaf, step, generator) for position, leaf in _smallest(self.positions, self.leaves)}
        other = copy(self)
        other._call = partial(_called_elsewhere, self._model, self._call, self._table, moved)
        return other

    def unchanged(self) -> AbstractContextManager[None]:
        """A block for one call and what is done with its graph. Buffers that the forward updates then have their values again.

        Each sample that runs alone has to meet the buffers that its batch has met: a bank of earlier features, a moving average.
        """
        return restoring_state(self._model)

    def __call__(self, inputs: Any) -> Any:
        """The model's outputs; a tuple is spread over positions and a mapping over keywords."""
        with numpy_of_frozen(self._table):
            return call_model(self._call, inputs)


def _smallest(positions: Sequence[int], leaves: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """The smallest parameters, at least one, and more as long as they have few numbers together."""
    count = 0
    for position, leaf in sorted(zip(positions, leaves, strict=True), key=lambda pair: pair[1].numel()):
        if count and count + leaf.numel() > FEW_NUMBERS:
            return
        count += leaf.numel()
        yield position, leaf


def _moved(leaf: Tensor, step: float, generator: torch.Generator) -> Tensor:
    """A parameter plus random numbers; the gradient passes through to the parameter unchanged."""
    direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float32, device="cpu").to(leaf)
    size = at_least_float32(leaf.detach()).norm() / leaf.numel() ** 0.5
    return leaf + step * torch.where(size > 0, size, SIZE_OF_ZERO).to(direction) * direction


def _called_elsewhere(
    model: nn.Module,
    call: Callable[..., Any],
    table: ParameterTable,
    moved: Mapping[int, Tensor],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What the model returns while other tensors are in the places of some parameters."""
    places: list[tuple[dict[str, Any], str, Tensor, Tensor]] = [
        (module._parameters, local, cast("Tensor", module._parameters[local]), moved[position])
        for module in model.modules()
        for local, position in table.owned(module).items()
        if position in moved
    ]

    def put_back() -> None:
        for parameters, local, own, _ in places:
            parameters[local] = own

    with restoring(put_back):
        for parameters, local, _, other in places:
            parameters[local] = other
        return call(*args, **kwargs)


def _dequantized(table: ParameterTable) -> dict[int, Tensor]:
    """Position -> a leaf with the numbers that a quantized weight's codes stand for; empty if some weight does not tell them."""
    try:
        plain = {position: table.tensors[position].detach().dequantize() for position in table.quantized}
        return {position: value.detach().requires_grad_() for position, value in plain.items()}
    except Exception:  # A package for quantized tensors may raise anything, and memory may run out.
        return {}


def _by_name(model: nn.Module, table: ParameterTable, weights: dict[int, Tensor]) -> dict[str, Tensor]:
    named = ((name, table.position(p)) for name, p in model.named_parameters())
    return {name: weights[position] for name, position in named if position in weights}


def _called_with(model: nn.Module, weights: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """What the model returns with other weights."""
    return functional_call(model, weights, args, kwargs)


def _agree(model: Callable[..., Any], other: Callable[..., Any], inputs: Any) -> bool:
    """Whether both return the same, up to rounding."""
    ours = list(tensors(call_model(model, inputs)))
    try:
        theirs = list(tensors(call_model(other, inputs)))
    except Exception:  # The layer takes only its own kind of weight.
        return False
    return len(ours) == len(theirs) and all(map(_is_near, ours, theirs))


def _is_near(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or not x.is_floating_point() or not x.numel():
        return x.shape == y.shape
    return bool((x - y).abs().max() <= DEQUANTIZED_OUTPUTS * x.abs().max())


def _warn(names: list[str]) -> None:
    warnings.warn(
        f"not verified: {', '.join(names[:3])}{' and others' if len(names) > 3 else ''}. Autograd gives no gradient in quantized "
        "weights, and with the numbers that their codes stand for the model can't run or is another function. All other "
        "parameters are verified.",
        stacklevel=2,
    )
