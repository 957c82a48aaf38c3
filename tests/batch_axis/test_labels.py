"""Labels against what autograd does: an entry that is labeled with one sample gets nothing from the outputs of others."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_secorder.autograd.nodes import value_shape
from torch_secorder.autograd.self_test import hooks_are_seen
from torch_secorder.batch_axis.derivation import Derivation
from torch_secorder.batch_axis.evidence import Unplaced
from torch_secorder.batch_axis.label_rules import COPY_SLICES
from torch_secorder.batch_axis.label_rules import written as writes
from torch_secorder.batch_axis.label_rules.asked import mark_of
from torch_secorder.batch_axis.label_rules.registry import RULES
from torch_secorder.batch_axis.label_rules.strided import AS_STRIDED
from torch_secorder.batch_axis.labels import NOBODY, SEVERAL, reshaped
from torch_secorder.batch_axis.placement import Layout, Placement

N = 3
aten = torch.ops.aten
Function = Callable[[Tensor], Tensor]


def rows(*values: int) -> Tensor:
    return torch.tensor(values)


ORDER = rows(2, 0, 1)
ROUTED = rows(0, 5, 2, 2, 4)  # of six rows; one is taken twice, and two are not taken


def gated(x: Tensor) -> Tensor:
    """Samples in rows, of which a router takes some in another order, and puts what it makes of them back."""
    h = x.flatten(0, 1)
    return torch.zeros_like(h).index_add(0, ROUTED, h[ROUTED].tanh() * 2).view(x.shape)


def columns_put(x: Tensor) -> Tensor:
    made = torch.zeros_like(x)
    made[:, :, rows(0, 2)] = x[:, :, :2].sin()
    return made


def written(x: Tensor, *parts: tuple[object, object], made: Tensor | None = None) -> Tensor:
    """Parts of a tensor, written into parts of another one; each of them through a view, as an assignment does."""
    made = torch.zeros_like(x) if made is None else made
    for there, here in parts:
        made[there] = x[here].sin()
    return made


def changed(x: Tensor, change: Callable[[Tensor], object]) -> Tensor:
    """A copy that is changed in place by something."""
    y = x * 1
    change(y)
    return y


class Reweighted(torch.autograd.Function):
    """Rows times numbers of their own, whose gradient is some other function of the same rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad.cumsum(-1) * w, (grad * x).sum(-1, keepdim=True)


class InTwo(torch.autograd.Function):
    """Two halves, of which the second is turned around."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., :2] * 1, x[..., 2:].flip(-1)

    @staticmethod
    def backward(ctx: Any, one: Tensor, other: Tensor) -> Tensor:
        return torch.cat([one, other.flip(-1)], -1)


class InTurn(torch.autograd.Function):
    """Pairs of rows, each in the opposite order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


class Halved(torch.autograd.Function):
    """A sum of which only the first part gets a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Clipped(torch.autograd.Function):
    """Its gradient has a length that all rows decide together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / grad.norm()


def by_entries() -> Iterator[tuple[str, Function]]:
    names = "exp expm1 exp2 log log1p log2 log10 sqrt rsqrt reciprocal sin cos tan tanh sigmoid sinh cosh erf erfc abs neg sign"
    for name in [*names.split(), "atan"]:
        yield name, lambda x, name=name: getattr(x.abs() + 0.1, name)()
    names = "silu gelu relu relu6 elu celu selu leaky_relu hardtanh hardswish hardsigmoid mish softplus logsigmoid"
    for name in names.split():
        yield name, lambda x, name=name: getattr(F, name)(x)


def changed_in_place(x: Tensor) -> Tensor:
    made = torch.zeros(N, 4, 5, dtype=x.dtype)
    made[:, 1:3, :4] = x
    made[:, 0, 1:] = x[:, 1].sin()
    return made


def views_changed_in_place(x: Tensor) -> Tensor:
    return (x.flatten(0, 1) * 2).view(N, 2, 4).relu_() + torch.zeros(N, 2, 4, dtype=x.dtype).copy_(x)


def samples_changed_in_place(x: Tensor) -> Tensor:
    made = torch.zeros(N, 2, 4, dtype=x.dtype)
    for row, sample in enumerate(ORDER.tolist()):
        made[row] = x[sample]
    return made


def recurrent(x: Tensor, *, state: bool) -> Tensor:
    layer = nn.LSTM(4, 5, batch_first=True).float()
    output, (hidden, _) = layer(x.float())
    return hidden[0] + output[:, 0] if state else output


def more_by_entries() -> Iterator[tuple[str, Function]]:
    names = (
        "acos asin atanh ceil deg2rad digamma erfinv floor frac i0 lgamma logit nan_to_num rad2deg round sgn sinc trunc"
    )
    for name in names.split():
        yield name, lambda x, name=name: getattr(x.sigmoid() * 0.9 + 0.05, name)() + x
    for name in ("acosh", "asinh", "tril", "triu", "angle"):
        yield name, lambda x, name=name: getattr(x.abs() + 1.1, name)() + x
    for name in ["entr", "i0e", "i1", "i1e", "log_ndtr", "ndtri"]:
        yield name, lambda x, name=name: getattr(torch.special, name)(x.sigmoid())
    for name in ("hardshrink", "softshrink"):
        yield name, getattr(F, name)
    for name in ("fmod", "remainder"):
        yield f"{name} of a number", lambda x, name=name: getattr(torch, name)(x, 0.3)
    yield "fake quantization", lambda x: torch.fake_quantize_per_tensor_affine(x.float(), 0.1, 0, -128, 127)
    steps = torch.full((2,), 0.1), torch.zeros(2, dtype=torch.int32)
    yield (
        "fake quantization of channels",
        lambda x: torch.fake_quantize_per_channel_affine(x.float(), *steps, 1, -128, 127),
    )
    for name in ["copysign", "fmax", "fmin", "hypot", "ldexp", "logaddexp2", "xlogy", "fmod", "remainder"]:
        yield (
            name,
            lambda x, name=name: (
                getattr(torch, name)(x, x.cos().abs() + 0.1) + getattr(torch, name)(x, x.new_tensor(2.0))
            ),
        )


def of_layers() -> Iterator[tuple[str, Function]]:
    """Layers of samples with two channels of four numbers, or with four channels of a map of two times four."""
    yield from more_by_entries()
    mean, scale = torch.zeros(2).double(), torch.ones(2).double().requires_grad_()
    yield "batch norm", lambda x: F.batch_norm(x, mean, scale.detach(), scale, scale)
    yield "batch norm over samples", lambda x: F.batch_norm(x, None, None, training=True)
    yield "instance norm", lambda x: F.instance_norm(x, weight=scale)
    yield "prelu", lambda x: F.prelu(x, scale)
    yield "rrelu", lambda x: F.rrelu(x, training=True)
    names = "reflection_pad1d replication_pad1d"
    for name in names.split():
        yield name, lambda x, name=name: getattr(aten, name)(x, (1, 2))
    yield "constant pads", lambda x: F.pad(x, (1, -1, 0, 2))
    yield "pads of samples", lambda x: F.pad(x, (0, 0, 0, 0, 1, -1)) + F.pad(x, (0, 0, 0, 0, -1, 1))
    yield "changed in place", changed_in_place
    yield "views changed in place", views_changed_in_place
    yield "samples changed in place", samples_changed_in_place
    yield "transposed in place", lambda x: (x * 1).transpose_(1, 2) + (x * 1)[..., 0].t_().t_()[:, :1, None]
    yield "a strided view in place", lambda x: (x * 1).as_strided_((N, 3, 4), (8, 2, 1))
    yield "overlapping windows", lambda x: (x * 1).as_strided((N, 3, 4), (8, 2, 1))
    yield "another stride", lambda x: (x * 1).as_strided((2, N, 4), (4, 8, 1))
    yield "windows", lambda x: x.unfold(2, 2, 1)
    yield "windows over samples", lambda x: x.unfold(0, 2, 1)[:, :, 0]
    yield "glu", lambda x: F.glu(x) * x.prod(2, keepdim=True)
    yield "prod", lambda x: x.prod(1)
    yield "fourier", lambda x: torch.fft.irfft2(torch.fft.fft(torch.fft.rfft2(x), dim=1))
    yield "fourier over samples", lambda x: torch.fft.rfft(x, dim=0).real
    yield "lstm", lambda x: recurrent(x, state=False)
    yield "state of an lstm", lambda x: recurrent(x, state=True)
    yield "bilinear", lambda x: F.bilinear(x, x.sin(), torch.ones(5, 4, 4).double())
    yield (
        "mv",
        lambda x: x.flatten(1).mv(torch.ones(8).double()) + torch.addmv(x[:, 0, 0], x[:, 0], torch.ones(4).double()),
    )
    yield "cdist", lambda x: torch.cdist(x, x.sin()[:, :1])
    yield "matrices", lambda x: matrices(x)
    for name, function in MAPS.items():
        yield name, lambda x, function=function: function(x[:, None])
    for name, function in VOLUMES.items():
        yield name, lambda x, function=function: function(x[:, None, None])


def matrices(x: Tensor) -> Tensor:
    """Each sample's own matrix, through what takes matrices apart."""
    one = x @ x.mT + 5 * torch.eye(2).double()
    factor = torch.linalg.cholesky(one)
    return (
        torch.linalg.inv(one)
        + torch.linalg.matrix_exp(one / 9)
        + torch.linalg.solve_triangular(factor, one, upper=False)
    )


# Two of each sample's features in each row, and two of three rows, which are not the same for all samples.
PLACES = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]]).bool()[torch.tensor([[0, 1], [1, 1], [1, 0]])]
PICKED = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 1]]).bool()[..., None]
GRID = torch.rand(N, 3, 3, 2).double() - 0.5

# What takes samples with one channel of a map of two times four.
MAPS: dict[str, Function] = {
    "max pool": lambda x: F.max_pool2d(x, 2) + F.adaptive_max_pool2d(x, 1),
    "average pool": lambda x: F.avg_pool2d(x, 2) + F.adaptive_avg_pool2d(x, (1, 2)),
    "fractional pool": lambda x: F.fractional_max_pool2d(x, 1, output_size=(1, 2)),
    "upsample 1d": lambda x: F.interpolate(x[:, 0], 8) + F.interpolate(x[:, 0], 8, mode="nearest-exact"),
    "upsample linear": lambda x: F.interpolate(x[:, 0], 8, mode="linear"),
    "upsample": lambda x: F.interpolate(x, (4, 8)) + F.interpolate(x, (4, 8), mode="nearest-exact"),
    "upsample smoothly": lambda x: F.interpolate(x, (4, 8), mode="bilinear") + F.interpolate(x, (4, 8), mode="bicubic"),
    "antialias": lambda x: (
        F.interpolate(x, (1, 2), mode="bilinear", antialias=True)
        + F.interpolate(x, (1, 2), mode="bicubic", antialias=True)
    ),
    "pads of maps": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect") + F.pad(x, (1, 1, 1, 1), mode="replicate"),
    "pixel shuffle": lambda x: F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2),
    "channel shuffle": lambda x: F.channel_shuffle(x.view(N, 4, 1, 2), 2),
    "unfold and fold": lambda x: F.fold(F.unfold(x, (1, 2)), (2, 4), (1, 2)),
    "grid sample": lambda x: F.grid_sample(x, GRID, align_corners=False),
    "dropout of maps": lambda x: F.dropout2d(x),
}
VOLUMES: dict[str, Function] = {
    "max pool 3d": lambda x: F.max_pool3d(x, (1, 2, 2)) + F.adaptive_max_pool3d(x, 1),
    "average pool 3d": lambda x: F.avg_pool3d(x, (1, 2, 2)) + F.adaptive_avg_pool3d(x, (1, 1, 2)),
    "fractional pool 3d": lambda x: F.fractional_max_pool3d(x.repeat(1, 1, 2, 1, 1), 1, output_size=(1, 1, 2)),
    "upsample 3d": lambda x: F.interpolate(x, (2, 4, 8)) + F.interpolate(x, (2, 4, 8), mode="nearest-exact"),
    "upsample trilinearly": lambda x: F.interpolate(x, (2, 4, 8), mode="trilinear"),
    "pads of volumes": lambda x: F.pad(x, (1, 1, 1, 1, 0, 0), mode="reflect") + F.pad(x, (1,) * 6, mode="replicate"),
    "grid sample 3d": lambda x: F.grid_sample(x, torch.rand(N, 2, 2, 2, 3).double() - 0.5, align_corners=False),
}

FUNCTIONS: dict[str, Function] = {
    **dict(by_entries()),
    "add": lambda x: x + x[:, :1],
    "sub": lambda x: x - x.sum(),
    "rsub": lambda x: torch.rsub(x, 1.0),
    "mul": lambda x: x * x.mean(0),
    "div": lambda x: x / (x.abs().sum(2, keepdim=True) + 1),
    "pow": lambda x: x.pow(3),
    "pow of tensors": lambda x: x.abs().pow(x.cos()) + 2**x,
    "div with rounding": lambda x: torch.div(x, x.cos(), rounding_mode="trunc") + x,
    "lerp by a tensor": lambda x: x.lerp(x.cos(), x.sin()),
    "masked_fill with a tensor": lambda x: x.masked_fill(x > 0, x.new_tensor(2.0)),
    "clamp by tensors": lambda x: x.clamp(x.sin() - 1, x.sin() + 1).clamp_min(x.cos()).clamp_max(x.cos() + 1),
    "in place": lambda x: F.elu_(x * 1) + F.leaky_relu_(x * 1) + F.threshold_(x * 1, 0.1, 0.0) + F.celu_(x * 1),
    "unsqueeze in place": lambda x: (x * 1).unsqueeze_(1),
    "numbers": lambda x: aten.div.Scalar(aten.mul.Scalar(aten.sub.Scalar(aten.rsub.Tensor(x, x.cos()), 1.0), 2.0), 3.0),
    "reshaped without a copy": lambda x: aten._reshape_alias(x, (N, 4, 2), (8, 1, 4)),
    "native dropout": lambda x: torch.native_dropout(x, 0.5, True)[0],
    "where": lambda x: torch.where(x > 0, x, x[:1]),
    "masked_fill": lambda x: x.masked_fill(x > 0, 2.0),
    "maximum": lambda x: torch.maximum(x, x[:, 1:]),
    "minimum": lambda x: torch.minimum(x, x.roll(1, 0)),
    "lerp": lambda x: x.lerp(x.cos(), 0.3),
    "addcmul": lambda x: torch.addcmul(x, x.sin(), x.cos()),
    "addcdiv": lambda x: torch.addcdiv(x, x.sin(), x.cos()),
    "logaddexp": lambda x: torch.logaddexp(x, x.sin()),
    "atan2": lambda x: torch.atan2(x, x.cos()),
    "clamp": lambda x: x.clamp(-1, 1).clamp_min(-0.5).clamp_max(0.5),
    "threshold": lambda x: F.threshold(x, 0.1, 0.0),
    "dropout": lambda x: F.dropout(x, 0.5),
    "clone": lambda x: x.clone().to(torch.float32).to(torch.float64),
    "alias": lambda x: torch.ops.aten.alias(x),
    "complex": lambda x: torch.view_as_real(torch.view_as_complex(x.view(N, 2, 2, 2)).conj().resolve_conj().roll(1, 1)),
    "complex from parts": lambda x: torch.view_as_real(torch.complex(x, x.sin()) * torch.polar(x.exp(), x)),
    "views": lambda x: x.view(N, 2, 2, 2).view(N * 2, 4).unsqueeze(1).squeeze(1).reshape(N, 8),
    "views that mix samples": lambda x: x.flatten(0, 1).view(2, N, 4),
    "a reshape with a copy": lambda x: x.transpose(0, 1).reshape(2, N * 4).view(2, N, 4),
    "squeeze": lambda x: x[:, :1].squeeze(),
    "squeeze two": lambda x: x[:, :1, :1].squeeze((1, 2)),
    "t": lambda x: x[:, 0].t(),
    "transpose": lambda x: x.transpose(0, 2).transpose(-1, -2),
    "permute": lambda x: x.permute(2, -3, 1),
    "expand": lambda x: x.unsqueeze(1).expand(N, 5, 2, 4),
    "expand what samples share": lambda x: x.mean(0).expand(N, 2, 4),
    "repeat": lambda x: x.repeat(2, 1, 3, 1),
    "repeat samples": lambda x: x.repeat(2, 1, 1)[N:],
    "repeat each": lambda x: x.repeat_interleave(2, 0),
    "sums": lambda x: x.sum(-1).sum(1, keepdim=True),
    "sum over samples": lambda x: x + x.sum(0),
    "sum over all": lambda x: x.sum((0, 2)),
    "means": lambda x: x.mean((1, 2)),
    "var": lambda x: x.var(1) + x.std(1),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=(1, 2)),
    "logsumexp": lambda x: x.logsumexp(2).logsumexp(1, keepdim=True),
    "amax": lambda x: x.amax(1).amin(1),
    "max": lambda x: x.max(1)[0].min(1)[0],
    "max over samples": lambda x: x.max(0)[0],
    "kthvalue": lambda x: x.kthvalue(2, 1)[0].median(1)[0],
    "softmax": lambda x: x.softmax(-1).log_softmax(1),
    "safe softmax": lambda x: aten._safe_softmax(x, -1),
    "softmax over samples": lambda x: x.softmax(0),
    "cumulative": lambda x: x.cumsum(1).cumprod(2).cummax(1)[0].cummin(1)[0].logcumsumexp(2),
    "cumulative over samples": lambda x: x.cumsum(0),
    "sort": lambda x: x.sort(-1)[0].topk(2, 1)[0],
    "sort samples": lambda x: x.sort(0)[0],
    "gather": lambda x: x.gather(2, torch.tensor([[[0, 0, 3]]]).expand(N, 2, 3)),
    "topk of the rows of samples": lambda x: x.flatten(0, 1).topk(5, 0)[0],
    "topk of rows": lambda x: x.flatten(0, 1).topk(6, 0)[0].cumsum(1),
    "sort rows": lambda x: x.view(6, 4).sort(0)[0],
    "gather rows": lambda x: x.flatten(0, 1).gather(0, ROUTED[:, None].expand(5, 4)),
    "gather each": lambda x: x.flatten(0, 1).gather(0, torch.stack([ROUTED, ROUTED.flip(0)], 1).repeat(1, 2)),
    "gather samples": lambda x: x.gather(0, ORDER[:, None, None].expand(N, 2, 4)),
    "gather from fewer samples": lambda x: x.gather(2, torch.tensor([[[0, 3]]]).expand(2, 1, 2)),
    "roll": lambda x: x.roll((1, 2), (0, 2)),
    "roll all": lambda x: x.roll(3),
    "flip": lambda x: x.flip(0).flip(-1),
    "select": lambda x: x[:, 1] + x.select(-1, -2)[:, :1],
    "select samples": lambda x: torch.stack([x[2], x[0], x[-2]]),
    "slice": lambda x: torch.cat([x[..., 2:], -x[..., :2]], -1),
    "slice samples": lambda x: torch.cat([x[1:], x[:1]]),
    "slice with steps": lambda x: torch.cat([x[::2], x[1::2]]),
    "narrow": lambda x: x.narrow(0, 1, 2),
    "split": lambda x: x.split([1, 3], 2)[1] * x.chunk(4, 2)[0],
    "split samples": lambda x: torch.cat(x.split([2, 1])[::-1]),
    "a part of a split": lambda x: x.split([2, 1])[1],
    "split features": lambda x: x.chunk(2, -1)[0] * x.chunk(2, -1)[1].tanh(),
    "unsafe split": lambda x: torch.unsafe_split(x, 2)[0],
    "unbind": lambda x: torch.stack(x.unbind(1), 2) + x.unbind(1)[1][:, :, None],
    "unbind samples": lambda x: torch.stack([x.unbind()[2], x.unbind()[0].sin()]),
    "cat": lambda x: torch.cat([x, torch.zeros(2, 2, 4), x.cos()]),
    "cat with several others": lambda x: torch.cat([torch.zeros(2, 2, 4), x, torch.zeros(1, 2, 4)]),
    "stack": lambda x: torch.stack([x, x.cos()], 1).sum(1),
    "stack of samples": lambda x: torch.stack([x[1], x[2], x[0]], 0) * torch.stack([x[0], x[0]]).sum(0),
    "index": lambda x: x[ORDER],
    "index rows": lambda x: x.flatten(0, 1)[ROUTED],
    "index features": lambda x: x[:, :, rows(3, 0)],
    "index pairs": lambda x: x[ORDER, rows(1, 0, 0)],
    "index pairs apart": lambda x: x[ORDER, :, rows(1, 0, 0)],
    "index with an axis in front": lambda x: x[None, ORDER][0],
    "index with negative numbers": lambda x: x[rows(-1, 0)],
    "index in two axes": lambda x: x[torch.stack([ORDER, ORDER.flip(0)])],
    "index with a number": lambda x: x[torch.tensor(1)],
    "a mask": lambda x: x[torch.tensor([True, False, True])],
    "a mask of rows": lambda x: x[torch.tensor([[True, False], [False, True], [True, True]])],
    "index of what samples share": lambda x: x.mean(0)[rows(0, 1, 1)],
    "index_select": lambda x: x.index_select(0, ORDER).index_select(-1, rows(0, 2)),
    "index_put": lambda x: torch.zeros(5, 2, 4, dtype=x.dtype).index_put((rows(4, 0, 2),), x),
    "index_put over": lambda x: x.index_put((rows(0, 2),), x[:2].sin()),
    "index_put of one": lambda x: x.index_put((rows(0, 2),), x[1].sin()),
    "index_put columns": columns_put,
    "index_add": lambda x: x.index_add(0, rows(1, 1, 0), x.sin(), alpha=2),
    "index_add columns": lambda x: x.index_add(2, rows(1, 0), x[..., :2].sin()),
    "index_copy": lambda x: x.index_copy(0, rows(2, 0), x[:2].sin()),
    "scatter": lambda x: torch.zeros_like(x).scatter(0, ORDER[:, None, None].expand(N, 2, 4), x.sin()),
    "scatter of rows": lambda x: (
        torch.zeros(6, 5, dtype=x.dtype).scatter(1, rows(3, 0, 1, 4).expand(6, 4), x.view(6, 4)).T.contiguous().T
    ),
    "scatter one of each row": lambda x: (
        torch.zeros(6, 3, dtype=x.dtype)
        .scatter(1, rows(2, 0, 1, 1, 2, 0)[:, None], x.view(6, 4)[:, 1:2])
        .view(N, 2, 3)[:, :, rows(1, 0, 2)]
    ),
    "scatter_add each": lambda x: torch.zeros(6, 4, dtype=x.dtype).scatter_add(
        0, torch.stack([ROUTED, ROUTED.flip(0)], 1).repeat(1, 2), x.flatten(0, 1)[:5]
    ),
    "scatter samples over": lambda x: x.scatter(0, ORDER[:, None, None].expand(N, 2, 4), x.sin()),
    "scatter_add": lambda x: torch.zeros(6, 4, dtype=x.dtype).scatter_add(
        0, ROUTED[:, None].expand(5, 4), x.flatten(0, 1)[:5]
    ),
    "scatter_add with other columns": lambda x: x.scatter_add(0, torch.randint(N, (N, 2, 4)), x.sin()),
    "scatter_add along features": lambda x: x.scatter_add(2, torch.zeros(N, 2, 4).long(), x.sin()),
    "scatter_add to fewer": lambda x: x.scatter_add(2, torch.zeros(2, 1, 4).long(), x[:2, :1].sin()),
    "mm": lambda x: x.flatten(1).mm(torch.ones(8, 2, dtype=x.dtype)),
    "mm of samples": lambda x: x.flatten(1).mm(x.flatten(1).t()),
    "mm from the left, over samples": lambda x: torch.eye(N, dtype=x.dtype)[ORDER].mm(x.flatten(1)),
    "addmm": lambda x: torch.addmm(x[:, 0, :2], x.flatten(1), torch.ones(8, 2, dtype=x.dtype)),
    "bmm": lambda x: x.bmm(x.mT),
    "baddbmm": lambda x: torch.baddbmm(x[:, :, :2], x, x.mT),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.view(N, 1, 2, 4)] * 3),
    "attention over samples": lambda x: F.scaled_dot_product_attention(*[x.transpose(0, 1).unsqueeze(0)] * 3),
    "convolution": lambda x: F.conv1d(x, torch.ones(3, 2, 2, dtype=x.dtype)),
    "convolution in groups": lambda x: F.conv1d(
        x.reshape(1, 2 * N, 4), torch.ones(3 * N, 2, 2, dtype=x.dtype), groups=N
    ).view(N, 3, 3),
    "convolution over samples": lambda x: F.conv1d(
        x.reshape(1, 2 * N, 4), torch.ones(2 * N, N, 2, dtype=x.dtype), groups=2
    ).view(N, 2, 3),
    "transposed convolution in groups": lambda x: F.conv_transpose1d(
        x.reshape(1, 2 * N, 4), torch.ones(2 * N, 3, 2, dtype=x.dtype), groups=N
    ).view(N, 3, 5),
    "convolution of images in groups": lambda x: F.conv1d(x, torch.ones(6, 1, 2, dtype=x.dtype), groups=2),
    "group norm of folded channels": lambda x: F.group_norm(x.reshape(1, 2 * N, 4), N).view(x.shape),
    "max pool": lambda x: F.max_pool2d(x[:, None], 2, 1) + F.max_pool3d(x[:, None, None], (1, 2, 2), 1)[:, 0],
    "average pool": lambda x: F.avg_pool2d(x[:, None], 2, 1) + F.avg_pool3d(x[:, None, None], (1, 2, 2), 1)[:, 0],
    "adaptive pools": lambda x: F.adaptive_avg_pool2d(x[:, None], (1, 2)) + F.adaptive_max_pool2d(x[:, None], (1, 2)),
    "adaptive pools of volumes": lambda x: (
        F.adaptive_avg_pool3d(x[:, None, None], (1, 1, 2)) + F.adaptive_max_pool3d(x[:, None, None], (1, 1, 2))
    ),
    "resized rows": lambda x: F.interpolate(x, 6) + F.interpolate(x, 6, mode="linear"),
    "resized maps": lambda x: sum(
        F.interpolate(x[:, None], (3, 5), mode=mode) for mode in ("nearest", "bilinear", "bicubic")
    ),
    "resized volumes": lambda x: sum(
        F.interpolate(x[:, None, None], (1, 3, 5), mode=mode) for mode in ("nearest", "trilinear")
    ),
    "pads by what is there": lambda x: sum(
        F.pad(x, (1, 1), mode=mode) + F.pad(x[:, None], (1, 1, 1, 1), mode=mode)[:, 0, 1:-1]
        for mode in ("reflect", "replicate")
    ),
    "batch norm": lambda x: F.batch_norm(x, torch.zeros(2).double(), torch.ones(2).double()),
    "batch norm by samples' own statistics": lambda x: F.batch_norm(x, None, None, training=True),
    "layer norm": lambda x: F.layer_norm(x, (4,)),
    "layer norm over samples": lambda x: F.layer_norm(x, (N, 2, 4)),
    "layer norm of single entries, then mixed": lambda x: x + F.layer_norm(x[..., None], (1,))[..., 0].cumsum(0),
    "group norm": lambda x: F.group_norm(x, 2),
    "rms norm": lambda x: F.rms_norm(x, (4,)),
    "tril": lambda x: x.tril() + x.triu(1),
    "index_fill": lambda x: x.index_fill(0, rows(1), 2.0).index_fill(2, rows(0, 3), x.new_tensor(1.0)),
    "index_fill with samples' sum": lambda x: x.index_fill(2, rows(0, 3), x[:, 0].sum()),
    "scatter of a number": lambda x: x.scatter(2, rows(0, 3).expand(N, 2, 2), -1.0),
    "solve": lambda x: torch.linalg.solve_triangular(x[:, :, :2].tril() + torch.eye(2).double() * 3, x, upper=False),
    "solve from the right": lambda x: torch.linalg.solve_triangular(
        x[:, :, :2] + torch.eye(2).double() * 3, x.mT, upper=True, left=False
    ),
    "solve for what samples share": lambda x: torch.linalg.solve_triangular(
        x[:1, :, :2] + torch.eye(2).double() * 3, x, upper=True
    ),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "pad and cut": lambda x: F.pad(x, (-1, 2, 1, -1)),
    "pad samples": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
    "pad and cut samples": lambda x: F.pad(x, (0, 0, 0, 0, 1, -1)),
    "a part written": lambda x: written(x, (np.s_[..., 1:3], np.s_[..., 2:])),
    "parts written": lambda x: written(x, (np.s_[..., :2], np.s_[..., 2:]), (np.s_[..., 2:], np.s_[..., :2])),
    "a part written over": lambda x: written(x, (np.s_[:, 0], np.s_[:, 1]), made=x * 1),
    "a part written, repeated": lambda x: written(x, (np.s_[:, :, ::2], np.s_[:, :, :1])),
    "a part written in half precision": lambda x: written(x.bfloat16(), (np.s_[..., 1:3], np.s_[..., 2:])).double(),
    "a part of samples written": lambda x: written(x, (np.s_[::2], np.s_[:2])),
    "samples written one by one": lambda x: written(x, (2, 0), (0, 1), (1, 2)),
    "samples written one by one over others": lambda x: written(x, (2, 0), (0, 1), made=x * 1),
    "one row of many written": lambda x: written(
        x, *[(place, (place % N, place % 2)) for place in (7, 300, 0)], made=torch.zeros(301, 4).bfloat16()
    ).double(),
    "all of a view written": lambda x: written(x.flatten(), (0, slice(None)), made=torch.zeros(1, 24).double())[0].view(
        N, 2, 4
    ),
    "a part added in place": lambda x: changed(x, lambda y: y[..., :2].add_(x[..., 2:])),
    "a part multiplied in place": lambda x: changed(x, lambda y: y[..., :2].mul_(x[..., 2:])),
    "a part scaled in place": lambda x: changed(x, lambda y: y[..., :2].mul_(3.0)),
    "a part turned around": lambda x: changed(x, lambda y: y.permute(2, 1, 0)[:2].copy_(x.permute(2, 1, 0)[1:3])),
    "a part scaled and written": lambda x: changed(
        x, lambda y: y.permute(2, 1, 0)[:2].copy_(x.permute(2, 1, 0)[1:3]).mul_(2)
    ),
    "samples written turned around": lambda x: changed(
        x, lambda y: y.permute(2, 1, 0)[..., 1:].copy_(x.permute(2, 1, 0)[..., :2])
    ),
    "a part repeated and written": lambda x: changed(x, lambda y: y.mT[:, ::2].copy_(x[:, :1, :2].mT.expand(N, 2, 2))),
    "a diagonal written": lambda x: changed(x, lambda y: y.diagonal(0, 1, 2).copy_(x[:, 0, 2:])),
    "a view changed in place": lambda x: changed(x, lambda y: y.view(6, 4).relu_()),
    "a view filled with a sum of samples": lambda x: changed(x, lambda y: y[:, 0].fill_(x.sum())),
    "cumulated in place over samples": lambda x: changed(x, lambda y: y[..., :2].cumsum_(0)),
    "strides": lambda x: (x * 1).as_strided((N, 3, 2), (8, 1, 2)),
    "strides across samples": lambda x: (x * 1).as_strided((N, 6), (6, 1)),
    "strides that part rows": lambda x: (x * 1).view(6, 4).as_strided((N, 3, 2, 2), (8, 2, 2, 1)),
    "masked_scatter": lambda x: x.sin().masked_scatter(PLACES, x[..., ::2].exp()),
    "masked_scatter of rows": lambda x: torch.zeros(N, 3, 4).double().masked_scatter(PICKED.expand(N, 3, 4), x.exp()),
    "masked_scatter of more than fits": lambda x: torch.zeros_like(x).masked_scatter(
        PICKED[:, :2].expand(N, 2, 4), x[:, :, None].expand(N, 2, 2, 4)
    ),
    "masked_scatter of numbers": lambda x: x.masked_scatter(PLACES, torch.ones(12).double()),
    "masked_scatter to other samples": lambda x: x.masked_scatter(PICKED[:, 1:].expand(N, 2, 4), x.exp()),
    "strides of what was permuted": lambda x: (x * 1).permute(2, 1, 0).as_strided((N, 2, 4), (8, 4, 1)),
    "strides of a part": lambda x: (x * 1)[..., 1:].as_strided((N, 2, 3), (8, 4, 1), 1),
    "strides on another axis": lambda x: (x * 1).flatten(0, 1).as_strided((4, N, 2), (1, 8, 4)).movedim(1, 0),
    "strides that overlap in half precision": lambda x: (x.bfloat16() * 1).as_strided((N, 3, 4), (8, 2, 1)).double(),
    "strides of what is repeated": lambda x: (x * 1)[:, :, None].expand(N, 2, 3, 4).as_strided((N, 2, 4), (8, 4, 1)),
    "strides that leave out rows": lambda x: (x * 1).as_strided((2, 4), (16, 1)),
    "a function that gives an input nothing": lambda x: Halved.apply(x, x.mean(0, keepdim=True).expand(N, 2, 4)),
    "a function that turns rows": lambda x: InTurn.apply(x.flatten(0, 1)).view(x.shape),
    "a function": lambda x: Reweighted.apply(x, x[..., :1].cos()),
    "a function of rows": lambda x: Reweighted.apply(x.flatten(0, 1)[ROUTED], x.flatten(0, 1)[ROUTED, :1].cos()),
    "a function that cumulates samples": lambda x: Reweighted.apply(
        x.permute(2, 1, 0), x.permute(2, 1, 0)[..., :1].cos()
    ),
    "a function with two outputs": lambda x: torch.cat([part * 2 for part in InTwo.apply(x)], -1),
    "a function with one output that is used": lambda x: InTwo.apply(x)[0],
    "a function that couples samples by a norm": lambda x: Clipped.apply(x),
    **dict(of_layers()),
    "no rule": lambda x: torch.linalg.svdvals(x),
    "no rule over samples": lambda x: torch.kron(x[:, 0], x[:, 0]),
    "router": gated,
    "router of parts": lambda x: torch.cat([part * 2 for part in x.flatten(0, 1)[ROUTED].split([3, 0, 2])])[
        rows(4, 1, 0)
    ],
}


def grouped(x: Tensor) -> Tensor:
    """Rows of experts, of which one has none."""
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    return F.grouped_mm(x.float().flatten(0, 1)[ROUTED], torch.ones(3, 4, 8), offs=ends)


if hasattr(F, "grouped_mm"):
    FUNCTIONS["grouped mm"] = grouped


def placement_for(shape: tuple[int, ...]) -> Placement:
    """Some placement on the first axis."""
    if shape[:1] == (N,):
        return Placement()
    return Placement(0, Layout.INDEXED, torch.arange(shape[0]) % N)


def reached_nodes(y: Tensor) -> list[Any]:
    seen, stack = [], [y.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.append(node)
            stack += [child for child, _ in node.next_functions]
    return seen


def drawn(function: Function) -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.randn(N, 2, 4, dtype=torch.float64, requires_grad=True)
        y = function(x * 1)
        return x, y if y.dim() else y[None]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_labeled_with_one_sample_is_that_samples(name: str) -> None:
    x, y = drawn(FUNCTIONS[name])
    where = placement_for(tuple(y.shape))
    derivation = Derivation([(y, where)], N, reached_nodes(y))
    (found,) = derivation.labels([torch.autograd.graph.get_gradient_edge(x)])
    assert found is not None
    labels = torch.from_numpy(np.broadcast_to(found, x.shape).copy())
    index = torch.arange(N) if where.sample_index is None else where.sample_index
    got = []
    for sample in range(N):
        part = torch.zeros_like(y)
        own = index == sample
        part[own] = torch.rand_like(part[own]) + 0.5
        got.append(torch.autograd.grad(y, x, part, retain_graph=True)[0] != 0)
    for sample, reached in enumerate(got):
        assert not (reached & ((labels == NOBODY) | ((labels >= 0) & (labels != sample)))).any()


# What the labels of these must be, for all that does not mix samples: nothing is gained by labeling everything with several.
MIX = {
    "views that mix samples",
    "sum over samples",
    "sum over all",
    "mul",
    "sub",
    "where",
    "minimum",
    "expand what samples share",
    "repeat each",
    "index of what samples share",
}


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if "samples" not in name and name not in MIX])
def test_what_is_one_samples_is_labeled_so(name: str) -> None:
    """But for what only a search shows: kinds without a rule, and what goes in and out along several axes at once."""
    unknown = {"no rule", "roll all", "index pairs apart", "cat with several others", "gather from fewer samples"}
    unknown |= {"scatter_add with other columns", "scatter_add to fewer"}
    unknown |= set() if hooks_are_seen() else {"a function that gives an input nothing"}
    x, y = drawn(FUNCTIONS[name])
    derivation = Derivation([(y, placement_for(tuple(y.shape)))], N, reached_nodes(y))
    (labels,) = derivation.labels([torch.autograd.graph.get_gradient_edge(x)])
    one_each = bool(((labels >= 0) | (labels == NOBODY)).all())
    expected = _exact(x, y)
    assert one_each == (expected and name not in unknown and not _is_unasked(y))


def _is_unasked(y: Tensor) -> bool:
    """Whether a node shows nothing and is not called, since this torch does not show whether hooks keep what nodes have saved."""
    return not hooks_are_seen() and any(node.name() in (COPY_SLICES, *AS_STRIDED) for node in reached_nodes(y))


def _exact(x: Tensor, y: Tensor) -> bool:
    """Whether each entry gets something from one sample at most."""
    where = placement_for(tuple(y.shape))
    index = torch.arange(N) if where.sample_index is None else where.sample_index
    count = torch.zeros_like(x)
    for sample in range(N):
        part = torch.zeros_like(y)
        part[index == sample] = torch.rand_like(part[index == sample]) + 0.5
        count += torch.autograd.grad(y, x, part, retain_graph=True)[0] != 0
    return bool((count <= 1).all())


def test_every_rule_is_met() -> None:
    met: set[str] = set()
    for function in FUNCTIONS.values():
        _, y = drawn(function)  # With torch 2.8 the node of a Python function is only there as long as its output is.
        met.update(node.name() for node in reached_nodes(y))
    elsewhere = {  # on GPUs and other devices
        "CudnnBatchNormBackward0",
        "CudnnGridSamplerBackward0",
        "CudnnRnnBackward0",
        "FusedRmsNormBackward0",
        "ScaledDotProductCudnnAttentionBackward0",
        "ScaledDotProductEfficientAttentionBackward0",
        "ScaledDotProductFlashAttentionBackward0",
        "ScaledDotProductFusedAttentionOverrideableBackward0",
    }
    elsewhere |= set() if hasattr(F, "grouped_mm") else {"GroupedMmBackward0"}
    there = {kind for kind in RULES if hasattr(torch._C._functions, kind)} - elsewhere
    assert not there - met, sorted(there - met)


def test_a_bias_of_fused_attention_has_the_samples_of_the_queries() -> None:
    """The node of GPUs is there on the meta device, too, which computes nothing."""
    q, k, v = (torch.randn(N, 2, 16, 8, device="meta", requires_grad=True) for _ in range(3))
    of_all = torch.randn(2, 16, 16, device="meta", requires_grad=True)
    of_each = torch.randn(N, 1, 16, 16, device="meta", requires_grad=True)
    bias = of_all + of_each
    y = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, compute_log_sumexp=True)[0]
    derivation = Derivation([(y, Placement())], N, reached_nodes(y))
    edges = [torch.autograd.graph.get_gradient_edge(x) for x in (q, bias, of_each, of_all)]
    queries, biases, each, shared = derivation.labels(edges)
    for labels in (queries, biases, each):
        assert labels.tolist() == np.arange(N).reshape(N, 1, 1, 1).tolist()
    assert shared.tolist() == [[[SEVERAL]]]


SHAPES = [(6, 4), (2, 3, 4), (2, 12), (24,), (2, 3, 2, 2), (1, 6, 4), (6, 1, 4), (3, 2, 4), (4, 6), (2, 3, 1, 4)]


@pytest.mark.parametrize(("old", "new"), list(itertools.product(SHAPES, SHAPES)))
def test_reshaped_labels_are_those_of_the_entries(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    for axes in itertools.product([False, True], repeat=len(old)):
        sizes = [size if own else 1 for size, own in zip(old, axes, strict=True)]
        labels = np.arange(np.prod(sizes)).reshape(sizes)
        expected = np.broadcast_to(labels, old).reshape(new)
        assert np.array_equal(np.broadcast_to(reshaped(labels, old, new), new), expected)


def keeping(ctx: Any, x: Tensor) -> None:
    ctx.kept = [x]


def calling(ctx: Any, x: Tensor) -> None:
    ctx.layer = nn.Identity()


@pytest.mark.parametrize("note", [keeping, calling], ids=lambda note: note.__name__)
def test_nothing_is_said_behind_a_function_that_is_not_called(note: Callable[[Any, Tensor], None]) -> None:
    called = []

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            note(ctx, x)
            return x * 1

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            called.append(grad)
            return grad

    y = Plain.apply(torch.randn(N, 2, requires_grad=True))
    assert Derivation([(y, Placement())], N, reached_nodes(y)).findings([]) is None
    assert not called


def test_hooks_on_saved_tensors_do_not_run_to_know_what_a_node_does() -> None:
    """A part is multiplied by a tensor that hooks keep, as nodes around it show, and is not called then."""
    unpacked = []

    def unpack(x: Tensor) -> Tensor:
        unpacked.append(x)
        return x

    x = torch.randn(N, 2, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
        y = changed(x, lambda y: y[..., :2].mul_(x[..., 2:])).sin()
    derivation = Derivation([(y, Placement())], N, reached_nodes(y))
    (found,) = derivation.findings([(torch.autograd.graph.get_gradient_edge(x), (N, 2, 4))])
    assert found.evidence is Unplaced.SHARED_BY_SAMPLES
    assert not unpacked


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 4), (300, 2), (7, 70_001)], ids=str)
def test_where_a_part_was_written(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The indices along each axis, also of tensors with more entries than the dtype can count."""
    made = torch.zeros(shape, dtype=dtype)
    part = (-1, *[slice(1, None, 3)] * (len(shape) - 1))
    made[part] = torch.ones(made[part].shape, dtype=dtype, requires_grad=True) * 1
    flags, size, numbers, *taken = writes._of_slices(made.grad_fn)
    assert flags.tolist() == [True, True, True]
    first, *steps = numbers.tolist()
    grid = np.ogrid[tuple([slice(count) for count in size.tolist()])]
    numbered = torch.arange(made.numel()).view(shape)[part].reshape(tuple(size.tolist()))
    assert (first + sum(place * step for place, step in zip(grid, steps, strict=True)) == numbered.numpy()).all()
    assert size.tolist() == [1, *made[part].shape] or size.tolist() == [*made[part].shape]
    expected = torch.zeros(shape, dtype=torch.int64)
    expected[part] = 1
    found = torch.ones((), dtype=torch.int64)
    for axis in taken:
        found = found[..., None] * axis
    assert found.sum() == size.prod()
    assert torch.equal(found, expected)


def view(x: Tensor, *stride: int) -> Tensor:
    return (x * 1).as_strided((3, 3, 2), stride)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_views_that_lie_in_memory_in_other_ways_have_other_marks(dtype: torch.dtype) -> None:
    """Also of inputs of one shape whose entries alone lie elsewhere, which no node shows."""
    x = torch.randn(3, 3, 2, dtype=dtype, requires_grad=True)
    turned = (x * 1).transpose(0, 1)
    views = [view(x, 6, 2, 1), view(x, 6, 0, 1), (turned * 1).as_strided((3, 3, 2), (6, 2, 1))]
    parts = [(x * 1).as_strided((2, 2), (2, 1), n) for n in (0, 1, 2)]
    for several in (views, parts):
        marks = [mark_of(y.grad_fn) for y in several]
        assert all(mark is not None and mark[0] == 1 for mark in marks)
        assert len({mark[1].item() for mark in marks}) == len(several)
    again = mark_of(view(x, 6, 2, 1).grad_fn)
    assert again is not None
    assert torch.equal(again, mark_of(views[0].grad_fn))
    assert mark_of(torch.view_as_complex(torch.ones(3, 2, requires_grad=True)).grad_fn) is None


def test_findings() -> None:
    """A place where rows of samples have no order, one that samples share, one that nothing arrives at, and regular ones."""
    x, w = torch.randn(N, 2, 4, requires_grad=True), nn.Parameter(torch.randn(4, 4))
    h = x * 1
    taken = h.flatten(0, 1)[ROUTED]
    product = taken.mm(w * 1)
    y = torch.zeros(6, 4).index_add(0, ROUTED, product).view(N, 2, 4)
    unused = (x * 2).sum()
    derivation = Derivation([(y, Placement()), (unused, None)], N, reached_nodes(y) + reached_nodes(unused))
    edges = [torch.autograd.graph.get_gradient_edge(one) for one in (product, h, unused)]
    weight = torch.autograd.graph.GradientEdge(product.grad_fn.next_functions[1][0], 0)
    views = [(edges[0], (5, 4)), (edges[1], (N, 2, 4)), (edges[1], (N * 2, 4)), (weight, (4, 4)), (edges[2], ())]
    listed, each, blocks, shared, nothing = derivation.findings(views)
    assert listed.evidence.layout is Layout.INDEXED
    assert listed.evidence.sample_index.tolist() == [0, 2, 1, 1, 2]
    assert each.evidence == Placement()
    assert blocks.evidence == Placement(0, Layout.BLOCKS)
    assert shared.evidence is Unplaced.SHARED_BY_SAMPLES
    assert nothing.evidence is Unplaced.NOT_REACHED
    assert value_shape(weight.node, 0) == (4, 4)
    assert SEVERAL != NOBODY


IN_PLACE: dict[str, tuple[Function, bool]] = {  # what is done to y with x, and whether the samples stay where they are
    "copied": (lambda y, x: y[..., 1:3].copy_(x[..., 2:]), True),
    "added": (lambda y, x: y[..., 1:3].add_(x[..., 2:], alpha=0.1), True),
    "multiplied": (lambda y, x: y[..., 1:3].mul_(x[..., 2:]), True),
    "multiplied for each sample": (lambda y, x: y[..., 1:3].mul_(x[:, :1, :1]), True),
    "put by an index": (lambda y, x: y[..., 1:3].index_put_((rows(1, 2, 0),), x[..., 2:]), False),
    "put by an index in order": (lambda y, x: y[..., 1:3].index_put_((rows(0, 1, 2),), x[..., 2:]), True),
    "copied for some": (lambda y, x: y[1:].copy_(x[:2]), False),
    "cumulated": (lambda y, x: y[..., 1:3].cumsum_(0), False),
    "centered": (
        lambda y, x: y[..., 1:3].sub_(y[..., 1:3].mean(0)),
        True,
    ),  # the mean is another node's, which mixes samples
    "smoothed": (lambda y, x: y[:, 0].addmm_((torch.eye(N) + torch.ones(N, N)).double(), x[:, 0]), False),
}


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_whether_a_write_keeps_the_order(name: str, dtype: torch.dtype) -> None:
    change, stays = IN_PLACE[name]
    x = torch.randn(N, 2, 4, dtype=dtype, requires_grad=True)
    if name == "smoothed" and dtype == torch.float32:
        x = x.detach().double().requires_grad_()
    y = x * 2
    change(y, x)
    assert isinstance(y.grad_fn, torch.autograd.graph.Node)
    answer = writes.keeps_order(y.grad_fn, 0)
    assert (answer is not None and bool(answer)) == stays


def test_a_write_of_more_rows_than_numbers_tell_apart() -> None:
    """Bfloat16 has seven whole numbers that are apart from their multiples' roundings."""
    for count, known in ((7, True), (70, False)):
        x = torch.randn(count, 4, dtype=torch.bfloat16, requires_grad=True)
        y = x * 2
        y[:, :2] = x[:, 2:]
        assert isinstance(y.grad_fn, torch.autograd.graph.Node)
        assert (writes.keeps_order(y.grad_fn, 0) is not None) == known
