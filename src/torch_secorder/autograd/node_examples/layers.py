"""Examples of products and layers."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from torch_secorder.autograd.node_examples.registry import Example, example, indices, numbers


@example("AddmmBackward0")
def _addmm() -> Example:
    b, x, w = numbers(2), numbers(3, 4), numbers(4, 2)
    return torch.addmm(b, x, w, beta=2, alpha=3), {"alpha": 3, "beta": 2, "left": x, "right": w}


@example("MmBackward0")
def _mm() -> Example:
    x, w = numbers(3, 4), numbers(4, 2)
    return torch.mm(x, w), {"left": x, "right": w}


@example("BmmBackward0")
def _bmm() -> Example:
    x, w = numbers(2, 3, 4), numbers(2, 4, 5)
    return torch.bmm(x, w), {"left": x, "right": w}


@example("BaddbmmBackward0")
def _baddbmm() -> Example:
    b, x, w = numbers(2, 3, 5), numbers(2, 3, 4), numbers(2, 4, 5)
    return torch.baddbmm(b, x, w), {"left": x, "right": w}


@example("MvBackward0")
def _mv() -> Example:
    x, w = numbers(3, 4), numbers(4)
    return torch.mv(x, w), {"left": x}


@example("GroupedMmBackward0")
def _grouped_mm() -> Example:
    x, w = numbers(3, 4, dtype=torch.float32), numbers(2, 4, 4, dtype=torch.float32)
    ends = indices(1, 3).int()
    return F.grouped_mm(x, w, offs=ends), {"left": x, "ends": ends}


@example("ConvolutionBackward0")
def _convolution() -> Example:
    x, w = numbers(1, 2, 4, 5), numbers(2, 1, 2, 3)
    sizes = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "output_padding": (0, 0)}
    output = F.conv2d(x, w, None, sizes["stride"], sizes["padding"], sizes["dilation"], groups=2)
    return output, sizes | {"input": x, "groups": 2, "transposed": False}


@example("EmbeddingBackward0")
def _embedding() -> Example:
    ids = indices(1, 0, 2)
    output = F.embedding(ids, numbers(4, 2), padding_idx=3)
    return output, {"ids": ids, "padding_id": 3, "by_frequency": False}


@example("NativeLayerNormBackward0")
def _layer_norm() -> Example:
    x, w = numbers(3, 4), numbers(4)
    scale = (x.var(1, unbiased=False) + 0.1).rsqrt()
    return F.layer_norm(x, (4,), w, w, 0.1), {"input": x, "shape": (4,), "mean": x.mean(1), "scale": scale}


@example("NativeGroupNormBackward0")
def _group_norm() -> Example:
    x, w = numbers(3, 4, 2), numbers(4)
    groups = x.reshape(6, 4)  # two channels of two numbers in each
    scale = (groups.var(1, unbiased=False) + 0.1).rsqrt()
    return F.group_norm(x, 2, w, w, 0.1), {"input": x, "groups": 2, "mean": groups.mean(1), "scale": scale}


@example("NativeBatchNormBackward0")
def _batch_norm() -> Example:
    x, w = numbers(3, 4), numbers(4)
    mean, variance = numbers(4).detach(), numbers(4).detach().square()
    expected = {"input": x, "mean": mean, "variance": variance, "eps": 0.125, "training": False}
    return F.batch_norm(x, mean, variance, w, w, eps=0.125), expected


@example("WeightNormInterfaceBackward0")
def _weight_norm() -> Example:
    v, g = numbers(3, 4, 2), numbers(1, 1, 2)
    return torch._weight_norm(v, g, 2), {"v": v, "g": g, "norms": v.square().sum((0, 1)).sqrt(), "axis": 2}


@example("PreluKernelBackward0")
def _prelu() -> Example:
    x = numbers(3, 4)
    return F.prelu(x, numbers(4)), {"input": x}


@example("TrilinearBackward0")
def _bilinear() -> Example:
    x, y = numbers(3, 4), numbers(3, 2)
    axes = {"expand1": (1, 3), "expand2": (0,), "expand3": (1, 2), "summed": (2, 3)}
    return F.bilinear(x, y, numbers(5, 4, 2)), axes | {"left": x, "right": y}


@example("MulBackward0")
def _mul() -> Example:
    x, w = numbers(3, 4), numbers(4)
    return x * w, {"left": x, "right": w}


@example("AddBackward0")
def _add() -> Example:
    return torch.add(numbers(3, 4), numbers(4), alpha=3), {"alpha": 3}


@example("SubBackward0")
def _sub() -> Example:
    return torch.sub(numbers(3, 4), numbers(4), alpha=3), {"alpha": 3}


@example("MkldnnRnnLayerBackward0")
def _lstm() -> Example:
    shapes = {"input": (2, 3, 4), "h0": (1, 3, 2), "c0": (1, 3, 2), "w_ih": (8, 4), "w_hh": (8, 2), "b_ih": (8,)}
    given = {name: numbers(*shape, dtype=torch.float32) for name, shape in shapes.items()}
    given["b_hh"] = numbers(8, dtype=torch.float32) + 1
    x, h0, c0, *weights = given.values()
    output = torch.lstm(x, (h0, c0), weights, True, 1, 0.0, True, False, False)[0]
    settings = {"mode": 2, "reverse": False, "batch_sizes": (), "has_biases": True}
    return output, given | settings | {"output": output, "workspace": None}
