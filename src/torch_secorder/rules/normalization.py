"""Normalizations: y = weight * normalized(x) + bias, whose gradients are sums of g * normalized(x) and of g."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_secorder.autograd.nodes import has_packed_tensors
from torch_secorder.autograd.saved import knows, saved
from torch_secorder.capture.records import Call
from torch_secorder.errors import CoupledSamplesError, CurvatureError, ShapeError
from torch_secorder.per_sample import at_least_float32
from torch_secorder.per_sample.profiles import profile_of
from torch_secorder.rules.registry import Gradients, register_refusal, register_rule

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
InstanceNorm = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d
_SCRIPTED_NORMS = {kind.__name__ for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)}
ANY_BATCH_NORM: Any = nn.BatchNorm1d.__base__  # Other libraries derive their batch norms from it, too.
_SINGLE_OR_DOUBLE = (torch.float32, torch.float64)
MODERATE = 16  # A mean of up to this many deviations costs few digits.
LARGE, MANY = 2**14, 512  # how many numbers make a sample large, and how many of its rows are added up at once
# CUDA's kernel has a block for each channel of each sample. With fewer elements most of it does nothing, so that many such blocks
# take longer than three more kernels (measured on one H100).
BLOCK, FEW = 64, 2**13
ROWS = range(16, 2**17)  # elements per channel: fewer fill no vector register, more lose digits in float32


@register_rule(nn.LayerNorm, depends_on=("normalized_shape", "eps"))
def layer_norm(module: nn.LayerNorm, call: Call) -> Gradients:
    """A norm by the statistics of the last axes."""
    x = _input(module, call, len(module.normalized_shape))
    if (statistics := _kept(call, x)) is not None:
        return _named(*_with_statistics(module.normalized_shape, x, call.grad_output, *statistics))
    normalized = F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    g = call.grad_output
    return _named(_over_positions(module, g * normalized), _over_positions(module, g))


@register_rule(nn.RMSNorm, depends_on=("normalized_shape", "eps"))
def rms_norm(module: nn.RMSNorm, call: Call) -> Gradients:
    """A norm by the root mean square of the last axes."""
    x = _input(module, call, len(module.normalized_shape))
    normalized = F.rms_norm(x, module.normalized_shape, None, module.eps)
    return {"weight": _over_positions(module, call.grad_output * normalized)}


@register_rule(nn.GroupNorm, depends_on=("num_groups", "eps"))
def group_norm(module: nn.GroupNorm, call: Call) -> Gradients:
    """A norm by the statistics of each sample's groups of channels."""

    def gradients(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return over_channels(F.group_norm(x, module.num_groups, None, None, module.eps), g)

    return _of_each_sample(gradients, call, _input(module, call, 1), own_batch=call.batch_axis is None)


@register_rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def instance_norm(module: InstanceNorm, call: Call) -> Gradients:
    """A norm by the statistics of each sample's channels, or by running ones in eval mode with ``track_running_stats``."""
    x = _input(module, call, 1)
    expected = {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}
    dims = next(dims for kind, dims in expected.items() if isinstance(module, kind))
    own_batch = call.batch_axis is None and x.dim() == 1 + dims
    if x.dim() != dims + own_batch:
        raise ShapeError(f"an {type(module).__name__} got an input of shape {tuple(x.shape)}, without a batch axis")

    def gradients(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        if not call.training and module.track_running_stats:
            return _running(module, x, g)
        return over_channels(F.instance_norm(x, eps=module.eps), g)

    return _of_each_sample(gradients, call, x, own_batch=own_batch)


@register_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def batch_norm(module: BatchNorm, call: Call) -> Gradients:
    """With running statistics a batch norm is an affine map; without them, the module is refused in forward."""
    return _of_each_sample(partial(_running, module), call, _input(module, call, 1), own_batch=call.batch_axis is None)


@register_refusal(ANY_BATCH_NORM)
def batch_statistics(module: BatchNorm) -> CurvatureError | None:
    """The refusal of a BatchNorm that normalizes with the whole batch, frozen or not, with parameters or without; else None."""
    state = _of_the_batch(module)
    return None if state is None else _coupled(f"it is {state}")


@register_refusal(torch.jit.ScriptModule)
def scripted_batch_statistics(module: torch.jit.ScriptModule) -> CurvatureError | None:
    """The refusal of scripted code that has such a BatchNorm inside, where no hook is called; else None."""
    for name, inner in module.named_modules():
        kind = getattr(inner, "original_name", None)
        if kind in _SCRIPTED_NORMS and (state := _of_the_batch(inner)) is not None:
            return _coupled(f"it has a {kind} '{name}', which is {state}")
    return None


def _coupled(what: str) -> CurvatureError:
    return CoupledSamplesError(
        f"{what} and normalizes with the statistics of the whole batch, so per-sample gradients do not exist; call "
        "model.eval() (with running statistics), or use GroupNorm"
    )


def _of_the_batch(module: Any) -> str | None:
    """Why a BatchNorm normalizes with the whole batch, if it does."""
    if module.training:
        return "in training mode"
    return "without running statistics" if module.running_mean is None else None


def _input(module: nn.Module, call: Call, trailing: int) -> Tensor:
    x: Tensor = call.argument(0, "x" if isinstance(module, nn.RMSNorm) else "input")
    if x.dim() <= trailing:
        raise ShapeError(f"a {type(module).__name__} got an input of shape {tuple(x.shape)}, without a batch axis")
    # Autocast widens the inputs of most norms on accelerators, so the output has a wider dtype than the input.
    return x.to(torch.promote_types(x.dtype, call.grad_output.dtype))


def _kept(call: Call, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """The statistics that the running layer norm's node saved, if its input is ``x``; autograd takes them for constants."""
    node, g = call.node, call.grad_output
    if torch.is_grad_enabled() or node is None or node.name() != "NativeLayerNormBackward0":
        return None
    if g.dtype != x.dtype or g.dtype not in _SINGLE_OR_DOUBLE:
        return None
    # Tensors that saved-tensor hooks keep may be fetched only once.
    if not knows(node.name(), "input", "mean", "scale") or has_packed_tensors(node) is not False:
        return None
    same = saved(node, "input")
    if (same.data_ptr(), same.shape, same.stride()) != (x.data_ptr(), x.shape, x.stride()):
        return None
    return saved(node, "mean"), saved(node, "scale")


def _with_statistics(shape: Sequence[int], x: Tensor, g: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a layer norm's weight and bias over the axes ``shape``, given the statistics of the input's other axes."""
    n, size = len(g), math.prod(shape)
    x, g, mean, scale = (value.reshape(n, -1, last) for value, last in ((x, size), (g, size), (mean, 1), (scale, 1)))
    if x[0].numel() < LARGE or not profile_of(x.device).has_caches:
        return ((x - mean).mul_(scale).mul_(g)).sum(1).view(n, *shape), g.sum(1).view(n, *shape)
    # torch's own gradient reads x and g once and writes only the sums. It adds up row after row, so that too many rows would
    # cost digits.
    own, like = torch.ops.aten.native_layer_norm_backward, x.new_empty(size)
    weight, bias = x.new_zeros(2, n, size)
    for start in range(0, x.shape[1], MANY):
        parts = (value[:, start : start + MANY] for value in (g, x, mean, scale))
        for own_weight, own_bias, g_n, x_n, mean_n, scale_n in zip(weight, bias, *parts, strict=True):
            _, more_weight, more_bias = own(g_n, x_n, [size], mean_n, scale_n, like, like, [False, True, True])
            own_weight += more_weight
            own_bias += more_bias
    return weight.view(n, *shape), bias.view(n, *shape)


def _over_positions(module: Any, value: Tensor) -> Tensor:
    """The sum over the axes between the batch axis and the normalized axes."""
    return value.reshape(value.shape[0], -1, *module.normalized_shape).sum(1)


def _of_each_sample(
    gradients: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], call: Call, x: Tensor, *, own_batch: bool
) -> dict[str, Tensor]:
    """Gradients from inputs ``[n, channels, ...]``, or ``[n, b, channels, ...]`` of a layer with a batch axis of its own.

    A layer has its own batch axis if it was called without the samples, for instance on a parameter.
    """
    if not own_batch:
        return _named(*gradients(x, call.grad_output))
    found = gradients(x.flatten(0, 1), call.grad_output.flatten(0, 1))
    return _named(*(value.unflatten(0, x.shape[:2]).sum(1) for value in found))


def _running(module: BatchNorm | InstanceNorm, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    assert module.running_mean is not None  # The module is refused otherwise.
    assert module.running_var is not None
    return with_running(x, g, module.running_mean, module.running_var, module.eps)


def _named(weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    return {"weight": weight, "bias": bias}


def over_channels(normalized: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a weight and a bias over axis 1, summed over all axes after it."""
    if _in_one_pass(normalized, g):
        channels = g.new_zeros(()).expand(g.shape[1])
        return _as_torch_does(normalized, g, channels, channels + 1, 0.0)
    g, normalized = (value.reshape(*g.shape[:2], -1) for value in (g, normalized))
    return torch.linalg.vecdot(g, normalized), g.sum(2)


def with_running(x: Tensor, g: Tensor, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same gradients for an input that is normalized by other statistics than its own."""
    if _in_one_pass(x, g):
        return _as_torch_does(x, g, mean, variance, eps)
    deviation = (variance + eps).sqrt() if g.device.type == "cpu" else None
    # On an accelerator the host would have to wait to learn which way is better. The first way takes fewer calls there, and is
    # always right.
    if deviation is None or torch.is_grad_enabled() or bool((mean.abs() > MODERATE * deviation).any()):
        x, g = at_least_float32(x), at_least_float32(g)
        mean, variance = mean.to(x.dtype), variance.to(x.dtype)
        return over_channels(F.batch_norm(x, mean, variance, None, None, False, 0.0, eps), g)
    # sum g (x - m) / s = (sum g x - m sum g) / s needs no normalized input, and only a mean far from zero costs digits.
    along, bias = over_channels(x.to(g.dtype), g)
    return (along - mean * bias) / deviation, bias


def _in_one_pass(x: Tensor, g: Tensor) -> bool:
    """Whether :func:`_as_torch_does` applies and is fast: on CUDA it is one kernel. Other devices were not tried."""
    if torch.is_grad_enabled() or x.dtype != g.dtype or g.dtype not in _SINGLE_OR_DOUBLE:
        return False
    elements = math.prod(g.shape[2:])
    fast = elements in ROWS if g.is_cpu else g.is_cuda and (elements >= BLOCK or math.prod(g.shape[:2]) <= FEW)
    return fast and x.is_contiguous() and g.is_contiguous()


def _as_torch_does(x: Tensor, g: Tensor, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The gradient of a batch norm by torch itself, called with every sample's channels as channels of one sample.

    It reads x and g once and writes only the sums; a product and two sums would go through main memory four times.
    """
    n, channels = g.shape[:2]
    mean, variance = (value.to(g.dtype).expand(n, -1).flatten() for value in (mean, variance))
    # On CUDA one kernel gives all three gradients. It wants a weight, on which only the gradient of the input depends, and
    # statistics of the batch, which it does not read.
    weight, unread = (None, None) if g.is_cpu else (mean, g.new_empty(0))
    _, weight, bias = torch.ops.aten.native_batch_norm_backward(
        *(g.view(1, n * channels, -1), x.view(1, n * channels, -1), weight, mean, variance, unread, unread, False, eps),
        [g.is_cuda, True, True],
    )
    return weight.view(n, channels), bias.view(n, channels)
