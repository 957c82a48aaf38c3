"""Convolutions and their transposes in 1, 2 and 3 dimensions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from torch_secorder.capture.records import Call
from torch_secorder.errors import ShapeError
from torch_secorder.per_sample import Convolution, sum_over
from torch_secorder.rules.registry import Gradients, register_rule

Convolved = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


@register_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(module: Convolved, call: Call) -> Gradients:
    """A convolution; padding that is not the same number of zeros on both sides is applied to the input first."""
    x, g = _of_each_sample(module, call)
    padding: Any = module.padding
    mode: str = module.padding_mode
    if isinstance(padding, str) or mode != "zeros":
        mode = "constant" if mode == "zeros" else mode
        padded = F.pad(x.flatten(0, 1), _both_sides(module), mode)
        x, padding = padded.unflatten(0, x.shape[:2]), (0,) * len(module.kernel_size)
    weight = Convolution(x, g, module.weight.shape, module.stride, tuple(padding), module.dilation, module.groups)
    return _with_bias(module, weight, g)


@register_rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def transposed_convolution(module: Transposed, call: Call) -> Gradients:
    """The adjoint of a convolution: its input is that convolution's output gradient, and the other way round."""
    x, g = _of_each_sample(module, call)
    sides: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):
        padding, reach = int(module.padding[axis]), module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
        # Output padding adds to one side only; taking it off there makes the adjoint's output exactly as long as x.
        extra = g.shape[axis + 3] + 2 * padding - reach - (x.shape[axis + 3] - 1) * module.stride[axis]
        sides += [padding, padding - extra]
    none = [0] * len(module.kernel_size)
    weight = Convolution(F.pad(g, sides), x, module.weight.shape, module.stride, none, module.dilation, module.groups)
    return _with_bias(module, weight, g)


def _both_sides(module: Convolved) -> list[int]:
    """How much is padded at both ends of each axis, the last axis first; the larger part of an odd number is at the end."""
    sides: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):
        if isinstance(module.padding, str):
            both = module.dilation[axis] * (module.kernel_size[axis] - 1) if module.padding == "same" else 0
            sides += [both // 2, both - both // 2]
        else:
            sides += [int(module.padding[axis])] * 2
    return sides


def _with_bias(module: Convolved | Transposed, weight: Convolution, g: Tensor) -> Gradients:
    # A convolution before a batch norm has no bias, whose sum would cost one more pass over the map.
    return {"weight": weight} if module.bias is None else {"weight": weight, "bias": sum_over(g.flatten(3), (1, 3))}


def _of_each_sample(module: Convolved | Transposed, call: Call) -> tuple[Tensor, Tensor]:
    """The input ``[n, r, channels, *map]`` and the output's gradient, with r = 1 map for each sample.

    A layer that was called without the samples, for instance on a parameter, has a batch axis of its own: r is its length.
    """
    x, g = call.argument(0, "input"), call.grad_output
    batched = len(module.kernel_size) + 2
    if call.batch_axis is None and x.dim() == batched + 1:
        return x, g
    if x.dim() != batched:
        raise ShapeError(f"a {type(module).__name__} got an input of shape {tuple(x.shape)}, without a batch axis")
    return x[:, None], g[:, None]
