"""Examples of nodes that move, take, put or reduce entries."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_secorder.autograd.node_examples.registry import EXAMPLES, Example, example, indices, numbers


@example("RepeatBackward0")
def _repeat() -> Example:
    return numbers(2).repeat(3, 2), {"times": (3, 2)}


@example("IndexBackward0")
def _index() -> Example:
    rows = indices(1, 0)
    return numbers(3, 4)[rows], {"indices": (rows,)}


@example("IndexSelectBackward0")
def _index_select() -> Example:
    rows = indices(1, 0)
    return numbers(3, 4).index_select(1, rows), {"axis": 1, "index": rows}


@example("FlipBackward0")
def _flip() -> Example:
    return numbers(3, 4).flip(1), {"axes": (1,)}


@example("RollBackward0")
def _roll() -> Example:
    return numbers(2, 3, 4).roll((1, 2), (2, 1)), {"axes": (2, 1), "shifts": (1, 2)}


@example("GatherBackward0")
def _gather() -> Example:
    columns = indices(1, 0)[None].expand(3, 2)
    return numbers(3, 4).gather(1, columns), {"axis": 1, "index": columns}


@example("SortBackward0")
def _sort() -> Example:
    return numbers(1, 3).sort(1, descending=True)[0], {"axis": 1, "index": indices(2, 1, 0)}


@example("TopkBackward0")
def _topk() -> Example:
    return numbers(1, 3).topk(2, 1)[0], {"axis": 1, "index": indices(2, 1)}


@example("AsStridedBackward0")
def _as_strided() -> Example:
    return numbers(3, 4).as_strided((2, 3), (4, 1), 2), {"size": (2, 3), "stride": (4, 1), "offset": 2}


@example("AsStridedBackward1")
def _as_strided_in_place() -> Example:
    return (numbers(3, 4) * 1).as_strided_((2, 3), (4, 1), 2), {"size": (2, 3), "stride": (4, 1), "offset": 2}


@example("ConstantPadNdBackward0")
def _pad() -> Example:
    return F.pad(numbers(3, 4), (1, 2, 0, 3)), {"pads": (1, 2, 0, 3)}


@example("FftC2CBackward0")
def _fft() -> Example:
    return torch.fft.fft(torch.complex(numbers(3, 4), numbers(3, 4)), dim=1), {"axes": (1,)}


@example("FftC2RBackward0")
def _fft_to_real() -> Example:
    return torch.fft.irfft(torch.complex(numbers(3, 4), numbers(3, 4)), dim=1), {"axes": (1,)}


@example("UnfoldBackward0")
def _unfold() -> Example:
    return numbers(3, 4).unfold(1, 2, 1), {"axis": 1}


@example("TransposeBackward1")
def _transpose_in_place() -> Example:
    return (numbers(2, 3, 4) * 1).transpose_(0, 2), {"axis": 0, "other": 2}


@example("TransposeBackward0")
def _transpose() -> Example:
    return numbers(2, 3, 4).transpose(0, 2), {"axis": 0, "other": 2}


@example("PermuteBackward0")
def _permute() -> Example:
    return numbers(2, 3, 4).permute(2, 0, 1), {"axes": (2, 0, 1)}


@example("SelectBackward0")
def _select() -> Example:
    return numbers(3, 4).select(1, 2), {"axis": 1, "index": 2}


@example("SliceBackward0")
def _slice() -> Example:
    return numbers(3, 9)[:, 1:8:2], {"axis": 1, "start": 1, "stop": 8, "step": 2}


@example("SplitBackward0")
def _split() -> Example:
    return numbers(3, 4).split(2, 1)[0], {"axis": 1, "size": 2}


@example("SplitWithSizesBackward0")
def _split_with_sizes() -> Example:
    return numbers(3, 4).split([1, 3], 1)[0], {"axis": 1, "sizes": (1, 3)}


@example("UnsafeSplitBackward0")
def _unsafe_split() -> Example:
    return torch.unsafe_split(numbers(3, 4), 2, 1)[0], {"axis": 1, "size": 2}


@example("IndexAddBackward0")
def _index_add() -> Example:
    rows = indices(1, 0)
    return numbers(3, 4).index_add(0, rows, numbers(2, 4)), {"axis": 0, "index": rows}


@example("IndexCopyBackward0")
def _index_copy() -> Example:
    rows = indices(1, 0)
    return numbers(3, 4).index_copy(0, rows, numbers(2, 4)), {"axis": 0, "index": rows}


@example("MaskedScatterBackward0")
def _masked_scatter() -> Example:
    mask = numbers(3, 4) > 0
    return numbers(3, 4).masked_scatter(mask, numbers(3, 4)), {"index": mask}


@example("IndexPutBackward0")
def _index_put() -> Example:
    rows = indices(1, 0)
    return numbers(3, 4).index_put((rows,), numbers(2, 4)), {"indices": (rows,)}


@example("ScatterBackward0")
def _scatter() -> Example:
    columns = indices(1, 0)[None].expand(3, 2)
    return numbers(3, 4).scatter(1, columns, numbers(3, 2)), {"axis": 1, "index": columns}


@example("ScatterAddBackward0")
def _scatter_add() -> Example:
    columns = indices(1, 0)[None].expand(3, 2)
    return numbers(3, 4).scatter_add(1, columns, numbers(3, 2)), {"axis": 1, "index": columns}


@example("CatBackward0")
def _cat() -> Example:
    return torch.cat([numbers(3, 4), numbers(3, 2)], 1), {"axis": 1}


@example("StackBackward0")
def _stack() -> Example:
    return torch.stack([numbers(3, 4), numbers(3, 4)], 1), {"axis": 1}


@example("SafeSoftmaxBackward0")
def _safe_softmax() -> Example:
    return torch.ops.aten._safe_softmax(numbers(3, 4), 1), {"axis": 1}


def _along_columns(function: Callable[..., Any], expected: dict[str, Any]) -> Example:
    """An example of a function that works along one axis, and of which the node shows no more than that axis."""
    found = function(numbers(3, 4), dim=1)
    return found if isinstance(found, Tensor) else found[0], expected


_ALONG_AXIS: dict[str, Callable[..., Any]] = {
    "CumsumBackward0": Tensor.cumsum,
    "CumprodBackward0": Tensor.cumprod,
    "CummaxBackward0": Tensor.cummax,
    "CumminBackward0": Tensor.cummin,
    "LogcumsumexpBackward0": Tensor.logcumsumexp,
    "SoftmaxBackward0": Tensor.softmax,
    "LogSoftmaxBackward0": Tensor.log_softmax,
    "MaxBackward0": Tensor.max,
    "MinBackward0": Tensor.min,
    "MedianBackward1": Tensor.median,
    "KthvalueBackward0": partial(Tensor.kthvalue, k=2),
    "UnsqueezeBackward0": Tensor.unsqueeze,
    "UnbindBackward0": Tensor.unbind,
    "GluBackward0": F.glu,
    "ProdBackward1": Tensor.prod,
}
_ALONG_AXES: dict[str, Callable[..., Any]] = {
    "AmaxBackward0": Tensor.amax,
    "AminBackward0": Tensor.amin,
    "SumBackward1": Tensor.sum,
    "MeanBackward1": Tensor.mean,
    "VarBackward0": Tensor.var,
    "StdBackward0": Tensor.std,
    "LinalgVectorNormBackward0": torch.linalg.vector_norm,
    "LogsumexpBackward0": Tensor.logsumexp,
    "FftR2CBackward0": torch.fft.rfft,
}
EXAMPLES.update({kind: partial(_along_columns, function, {"axis": 1}) for kind, function in _ALONG_AXIS.items()})
EXAMPLES.update({kind: partial(_along_columns, function, {"axes": (1,)}) for kind, function in _ALONG_AXES.items()})
