"""The gradient of a gate: values times gradients, added up over positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_secorder.autograd.double_precision import widest_dtype
from torch_secorder.autograd.precision import autocast_of_now
from torch_secorder.autograd.versions import version, versions
from torch_secorder.capture.records import Call
from torch_secorder.errors import CoverageError, ShapeError, UnsupportedError
from torch_secorder.model.channels import channel_axis
from torch_secorder.model.ranks import is_dtensor
from torch_secorder.per_sample import Dense, PerSampleGradient, at_least_float32, real_entries
from torch_secorder.pruning.gate_places import ANY_CONVOLUTION, GatePlace

_UNBATCHED: dict[type[nn.Module], int] = {nn.Conv1d: 2, nn.Conv2d: 3, nn.Conv3d: 4}


@dataclass(frozen=True)
class GateRule:
    """The rule of a module's gates: their gradients are sums over positions of a value times its gradient.

    Attributes:
        place: where the gates are.
    """

    place: GatePlace
    name = "gate"
    depends_on = None

    def __call__(
        self, module: nn.Module, call: Call, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, PerSampleGradient]:
        """The gradients of a call's gates, for each sample."""
        kept: KeptOutput | KeptInput = call.kept
        value, axis = kept.value(), call.batch_axis
        value = value[None] if axis is None else value.movedim(axis, 0)
        wide = widest_dtype(value.device)
        gradient, value = (real_entries(x).to(wide) for x in (kept.gradient(value, call), value))
        product = gradient * value
        # A gate multiplies both parts of a complex number, so that its gradient is the sum of those in the parts.
        product = product.sum(-1) if product.dim() > call.grad_output.dim() else product
        return {"gate": Dense(self.place.sums(product, axis))}


def _refuse_unbatched(module: nn.Module, x: Tensor, what: str) -> None:
    if (unbatched := _UNBATCHED.get(type(module))) is not None and x.dim() == unbatched:
        raise ShapeError(f"a {type(module).__name__} {what} of shape {tuple(x.shape)}, without a batch axis")


@dataclass(frozen=True, eq=False)
class KeptOutput:
    """A module's output as it was in forward, and what is needed to compute it again."""

    module: nn.Module
    output: Tensor
    output_version: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    versions: tuple[int, ...]
    autocast: Callable[[], AbstractContextManager[Any]]

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> KeptOutput:
        """The output of a running call."""
        _refuse_unbatched(module, output, "gave an output")
        before = versions((*args, *kwargs.values()))
        return cls(module, output.detach(), version(output), args, kwargs, before, autocast_of_now())

    @torch.no_grad()
    def value(self) -> Tensor:
        """The output; it is computed again if it was changed in place since, as by an activation.

        Raises:
            CoverageError: if the input was changed as well.
            UnsupportedError: if the module draws random numbers, which cannot be drawn again.
        """
        if version(self.output) == self.output_version:
            return self.output
        if versions((*self.args, *self.kwargs.values())) != self.versions:
            raise CoverageError("its input and its output were both changed in place; change one of them out of place")
        before = torch.get_rng_state()
        with self.autocast():
            found: Tensor = type(self.module).forward(self.module, *self.args, **self.kwargs)
        if not torch.equal(before, torch.get_rng_state()):
            torch.set_rng_state(before)
            raise UnsupportedError(
                "its output was changed in place and it draws random numbers, so that the output can't be had again: change "
                "it out of place"
            )
        return found

    @staticmethod
    def gradient(value: Tensor, call: Call) -> Tensor:
        """The gradient of the loss in the output, with the samples first."""
        return call.grad_output


@dataclass(frozen=True, eq=False)
class KeptInput:
    """A module's first argument and its weight as they were in forward."""

    module: nn.Module
    x: Tensor
    weight: Tensor
    versions: tuple[int, ...]

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> KeptInput:
        """The input of a running call."""
        x = args[0] if args else next(iter(kwargs.values()))
        _refuse_unbatched(module, x, "got an input")
        weight: Any = module.weight
        if is_dtensor(weight) or is_dtensor(x):
            raise UnsupportedError("gates on its input take its whole weight, which is in parts on several ranks")
        return cls(module, x.detach(), weight.detach(), versions((x, weight)))

    def value(self) -> Tensor:
        """The input.

        Raises:
            CoverageError: if the input or the weight was changed in place since.
        """
        if versions((self.x, self.weight)) != self.versions:
            raise CoverageError("its input or its weight was changed in place after the call; change it out of place")
        return self.x

    @torch.no_grad()
    def gradient(self, value: Tensor, call: Call) -> Tensor:
        """The gradient of the loss in the input, with the samples first, computed from the output's gradient.

        Raises:
            ShapeError: for a convolution that was called without a batch axis.
        """
        g = at_least_float32(call.grad_output)
        # Under autocast the layer multiplied by a cast copy of its weight.
        weight = at_least_float32(self.weight.to(call.grad_output.dtype))
        if not isinstance(self.module, ANY_CONVOLUTION):
            return g @ (weight.mT if channel_axis(self.module) else weight)
        if call.batch_axis is None:
            raise ShapeError("it was called without a batch axis, so that nothing shows which axis counts its channels")
        module: Any = self.module
        return torch.ops.aten.convolution_backward(
            *(g, value.to(g.dtype), weight, None, module.stride, module.padding, module.dilation),
            *(module.transposed, module.output_padding, module.groups, [True, False, False]),
        )[0]
