"""One node of each kind whose attributes the library reads, made of tiny tensors, with what it must have saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# An output that such a node made, and what the node must have saved, by our names. None stands for any tensor.
Example = tuple[Tensor, dict[str, Any]]
EXAMPLES: dict[str, Callable[[], Example]] = {}


def _example(kind: str) -> Callable[[Callable[[], Example]], Callable[[], Example]]:
    def register(example: Callable[[], Example]) -> Callable[[], Example]:
        EXAMPLES[kind] = example
        return example

    return register


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Different numbers around 0, of a tensor that requires a gradient."""
    count = math.prod(shape)
    x = torch.arange(count, dtype=dtype, device="cpu").sub(count / 2 - 0.25).div(count).reshape(shape)
    return x.requires_grad_()


def _indices(*values: int) -> Tensor:
    return torch.tensor(values, device="cpu")


@_example("AddmmBackward0")
def _addmm() -> Example:
    b, x, w = numbers(2), numbers(3, 4), numbers(4, 2)
    return torch.addmm(b, x, w, beta=2, alpha=3), {"alpha": 3, "beta": 2, "left": x, "right": w}


@_example("MmBackward0")
def _mm() -> Example:
    x, w = numbers(3, 4), numbers(4, 2)
    return torch.mm(x, w), {"left": x, "right": w}


@_example("BmmBackward0")
def _bmm() -> Example:
    x, w = numbers(2, 3, 4), numbers(2, 4, 5)
    return torch.bmm(x, w), {"left": x, "right": w}


@_example("MvBackward0")
def _mv() -> Example:
    x, w = numbers(3, 4), numbers(4)
    return torch.mv(x, w), {"left": x}


@_example("GroupedMmBackward0")
def _grouped_mm() -> Example:
    x, w = numbers(3, 4, dtype=torch.float32), numbers(2, 4, 4, dtype=torch.float32)
    ends = _indices(1, 3).int()
    return F.grouped_mm(x, w, offs=ends), {"left": x, "ends": ends}


@_example("ConvolutionBackward0")
def _convolution() -> Example:
    x, w = numbers(1, 2, 4, 5), numbers(2, 1, 2, 3)
    sizes = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "output_padding": (0, 0)}
    output = F.conv2d(x, w, None, sizes["stride"], sizes["padding"], sizes["dilation"], groups=2)
    return output, sizes | {"input": x, "groups": 2, "transposed": False}


@_example("EmbeddingBackward0")
def _embedding() -> Example:
    ids = _indices(1, 0, 2)
    output = F.embedding(ids, numbers(4, 2), padding_idx=3)
    return output, {"ids": ids, "padding_id": 3, "by_frequency": False}


@_example("NativeLayerNormBackward0")
def _layer_norm() -> Example:
    x, w = numbers(3, 4), numbers(4)
    scale = (x.var(1, unbiased=False) + 0.1).rsqrt()
    return F.layer_norm(x, (4,), w, w, 0.1), {"input": x, "shape": (4,), "mean": x.mean(1), "scale": scale}


@_example("NativeGroupNormBackward0")
def _group_norm() -> Example:
    x, w = numbers(3, 4, 2), numbers(4)
    groups = x.reshape(6, 4)  # two channels of two numbers in each
    scale = (groups.var(1, unbiased=False) + 0.1).rsqrt()
    return F.group_norm(x, 2, w, w, 0.1), {"input": x, "groups": 2, "mean": groups.mean(1), "scale": scale}


@_example("NativeBatchNormBackward0")
def _batch_norm() -> Example:
    x, w = numbers(3, 4), numbers(4)
    mean, variance = numbers(4).detach(), numbers(4).detach().square()
    expected = {"input": x, "mean": mean, "variance": variance, "eps": 0.125, "training": False}
    return F.batch_norm(x, mean, variance, w, w, eps=0.125), expected


@_example("PreluKernelBackward0")
def _prelu() -> Example:
    x = numbers(3, 4)
    return F.prelu(x, numbers(4)), {"input": x}


@_example("TrilinearBackward0")
def _bilinear() -> Example:
    x, y = numbers(3, 4), numbers(3, 2)
    axes = {"expand1": (1, 3), "expand2": (0,), "expand3": (1, 2), "summed": (2, 3)}
    return F.bilinear(x, y, numbers(5, 4, 2)), axes | {"left": x, "right": y}


@_example("RepeatBackward0")
def _repeat() -> Example:
    return numbers(2).repeat(3, 2), {"times": (3, 2)}


@_example("MulBackward0")
def _mul() -> Example:
    x, w = numbers(3, 4), numbers(4)
    return x * w, {"left": x, "right": w}


@_example("AddBackward0")
def _add() -> Example:
    return torch.add(numbers(3, 4), numbers(4), alpha=3), {"alpha": 3}


@_example("SubBackward0")
def _sub() -> Example:
    return torch.sub(numbers(3, 4), numbers(4), alpha=3), {"alpha": 3}


@_example("MkldnnRnnLayerBackward0")
def _lstm() -> Example:
    shapes = {"input": (2, 3, 4), "h0": (1, 3, 2), "c0": (1, 3, 2), "w_ih": (8, 4), "w_hh": (8, 2), "b_ih": (8,)}
    given = {name: numbers(*shape, dtype=torch.float32) for name, shape in shapes.items()}
    given["b_hh"] = numbers(8, dtype=torch.float32) + 1
    x, h0, c0, *weights = given.values()
    output = torch.lstm(x, (h0, c0), weights, True, 1, 0.0, True, False, False)[0]
    settings = {"mode": 2, "reverse": False, "batch_sizes": (), "has_biases": True}
    return output, given | settings | {"output": output, "workspace": None}


@_example("IndexBackward0")
def _index() -> Example:
    rows = _indices(1, 0)
    return numbers(3, 4)[rows], {"indices": (rows,)}


@_example("IndexSelectBackward0")
def _index_select() -> Example:
    rows = _indices(1, 0)
    return numbers(3, 4).index_select(1, rows), {"axis": 1, "index": rows}


@_example("FlipBackward0")
def _flip() -> Example:
    return numbers(3, 4).flip(1), {"axes": (1,)}


@_example("RollBackward0")
def _roll() -> Example:
    return numbers(2, 3, 4).roll((1, 2), (2, 1)), {"axes": (2, 1), "shifts": (1, 2)}


@_example("GatherBackward0")
def _gather() -> Example:
    columns = _indices(1, 0)[None].expand(3, 2)
    return numbers(3, 4).gather(1, columns), {"axis": 1, "index": columns}


@_example("SortBackward0")
def _sort() -> Example:
    return numbers(1, 3).sort(1, descending=True)[0], {"axis": 1, "index": _indices(2, 1, 0)}


@_example("TopkBackward0")
def _topk() -> Example:
    return numbers(1, 3).topk(2, 1)[0], {"axis": 1, "index": _indices(2, 1)}


@_example("KthvalueBackward0")
def _kthvalue() -> Example:
    return numbers(3, 4).kthvalue(2, 1)[0], {"axis": 1}


@_example("MedianBackward1")
def _median() -> Example:
    return numbers(3, 4).median(1)[0], {"axis": 1}


@_example("MaxBackward0")
def _max() -> Example:
    return numbers(3, 4).max(1)[0], {"axis": 1}


@_example("MinBackward0")
def _min() -> Example:
    return numbers(3, 4).min(1)[0], {"axis": 1}


@_example("CumsumBackward0")
def _cumsum() -> Example:
    return numbers(3, 4).cumsum(1), {"axis": 1}


@_example("CumprodBackward0")
def _cumprod() -> Example:
    return numbers(3, 4).cumprod(1), {"axis": 1}


@_example("CummaxBackward0")
def _cummax() -> Example:
    return numbers(3, 4).cummax(1)[0], {"axis": 1}


@_example("CumminBackward0")
def _cummin() -> Example:
    return numbers(3, 4).cummin(1)[0], {"axis": 1}


@_example("LogcumsumexpBackward0")
def _logcumsumexp() -> Example:
    return numbers(3, 4).logcumsumexp(1), {"axis": 1}


@_example("AmaxBackward0")
def _amax() -> Example:
    return numbers(3, 4).amax(1), {"axes": (1,)}


@_example("AminBackward0")
def _amin() -> Example:
    return numbers(3, 4).amin(1), {"axes": (1,)}


@_example("TransposeBackward0")
def _transpose() -> Example:
    return numbers(2, 3, 4).transpose(0, 2), {"axis": 0, "other": 2}


@_example("PermuteBackward0")
def _permute() -> Example:
    return numbers(2, 3, 4).permute(2, 0, 1), {"axes": (2, 0, 1)}


@_example("UnsqueezeBackward0")
def _unsqueeze() -> Example:
    return numbers(3, 4).unsqueeze(1), {"axis": 1}


@_example("UnbindBackward0")
def _unbind() -> Example:
    return numbers(3, 4).unbind(1)[0], {"axis": 1}


@_example("SelectBackward0")
def _select() -> Example:
    return numbers(3, 4).select(1, 2), {"axis": 1, "index": 2}


@_example("SliceBackward0")
def _slice() -> Example:
    return numbers(3, 9)[:, 1:8:2], {"axis": 1, "start": 1, "stop": 8, "step": 2}


@_example("SplitBackward0")
def _split() -> Example:
    return numbers(3, 4).split(2, 1)[0], {"axis": 1, "size": 2}


@_example("SplitWithSizesBackward0")
def _split_with_sizes() -> Example:
    return numbers(3, 4).split([1, 3], 1)[0], {"axis": 1, "sizes": (1, 3)}


@_example("UnsafeSplitBackward0")
def _unsafe_split() -> Example:
    return torch.unsafe_split(numbers(3, 4), 2, 1)[0], {"axis": 1, "size": 2}


@_example("IndexAddBackward0")
def _index_add() -> Example:
    rows = _indices(1, 0)
    return numbers(3, 4).index_add(0, rows, numbers(2, 4)), {"axis": 0, "index": rows}


@_example("IndexCopyBackward0")
def _index_copy() -> Example:
    rows = _indices(1, 0)
    return numbers(3, 4).index_copy(0, rows, numbers(2, 4)), {"axis": 0, "index": rows}


@_example("IndexPutBackward0")
def _index_put() -> Example:
    rows = _indices(1, 0)
    return numbers(3, 4).index_put((rows,), numbers(2, 4)), {"indices": (rows,)}


@_example("ScatterBackward0")
def _scatter() -> Example:
    columns = _indices(1, 0)[None].expand(3, 2)
    return numbers(3, 4).scatter(1, columns, numbers(3, 2)), {"axis": 1, "index": columns}


@_example("ScatterAddBackward0")
def _scatter_add() -> Example:
    columns = _indices(1, 0)[None].expand(3, 2)
    return numbers(3, 4).scatter_add(1, columns, numbers(3, 2)), {"axis": 1, "index": columns}


@_example("CatBackward0")
def _cat() -> Example:
    return torch.cat([numbers(3, 4), numbers(3, 2)], 1), {"axis": 1}


@_example("StackBackward0")
def _stack() -> Example:
    return torch.stack([numbers(3, 4), numbers(3, 4)], 1), {"axis": 1}


@_example("SoftmaxBackward0")
def _softmax() -> Example:
    return numbers(3, 4).softmax(1), {"axis": 1}


@_example("LogSoftmaxBackward0")
def _log_softmax() -> Example:
    return numbers(3, 4).log_softmax(1), {"axis": 1}


@_example("SumBackward1")
def _sum() -> Example:
    return numbers(3, 4).sum(1), {"axes": (1,)}


@_example("MeanBackward1")
def _mean() -> Example:
    return numbers(3, 4).mean(1), {"axes": (1,)}


@_example("VarBackward0")
def _var() -> Example:
    return numbers(3, 4).var(1), {"axes": (1,)}


@_example("StdBackward0")
def _std() -> Example:
    return numbers(3, 4).std(1), {"axes": (1,)}


@_example("LinalgVectorNormBackward0")
def _vector_norm() -> Example:
    return torch.linalg.vector_norm(numbers(3, 4), dim=1), {"axes": (1,)}


@_example("LogsumexpBackward0")
def _logsumexp() -> Example:
    return numbers(3, 4).logsumexp(1), {"axes": (1,)}


@_example("SafeSoftmaxBackward0")
def _safe_softmax() -> Example:
    return torch.ops.aten._safe_softmax(numbers(3, 4), 1), {"axis": 1}
