"""What the nodes of an autograd graph saved for their backward, under names of our own.

torch makes these attributes' names from its list of derivatives and promises none of them. Whoever wants to read some asks
:func:`knows` first, which the self-test answers once per process, and has another way where the answer is no.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from torch_secorder.autograd.self_test import attribute_names, confirmed

_COUNTER = itertools.count()
_AXIS = {"axis": "_saved_dim"}
_AXES = {"axes": "_saved_dim"}
_REDUCTION = {"reduction": "_saved_reduction"}

# Kind of node -> our name -> torch's.
ATTRIBUTES: dict[str, dict[str, str]] = {
    "AddmmBackward0": {"alpha": "_saved_alpha", "beta": "_saved_beta", "left": "_saved_mat1", "right": "_saved_mat2"},
    "MmBackward0": {"left": "_saved_self", "right": "_saved_mat2"},
    "BmmBackward0": {"left": "_saved_self", "right": "_saved_mat2"},
    "BaddbmmBackward0": {"left": "_saved_batch1", "right": "_saved_batch2"},
    "MvBackward0": {"left": "_saved_self"},
    "GroupedMmBackward0": {"left": "_saved_self", "ends": "_saved_offs"},
    "ConvolutionBackward0": {
        "input": "_saved_input",
        "stride": "_saved_stride",
        "padding": "_saved_padding",
        "dilation": "_saved_dilation",
        "groups": "_saved_groups",
        "transposed": "_saved_transposed",
        "output_padding": "_saved_output_padding",
    },
    "EmbeddingBackward0": {
        "ids": "_saved_indices",
        "padding_id": "_saved_padding_idx",
        "by_frequency": "_saved_scale_grad_by_freq",
    },
    "NativeLayerNormBackward0": {
        "input": "_saved_input",
        "shape": "_saved_normalized_shape",
        "mean": "_saved_result1",
        "scale": "_saved_result2",
    },
    "FusedRmsNormBackward0": {
        "input": "_saved_input",
        "shape": "_saved_normalized_shape",
        "scale": "_saved_result1",
    },
    "NativeGroupNormBackward0": {
        "input": "_saved_input",
        "groups": "_saved_group",
        "mean": "_saved_result1",
        "scale": "_saved_result2",
    },
    "NativeBatchNormBackward0": {
        "input": "_saved_input",
        "mean": "_saved_running_mean",
        "variance": "_saved_running_var",
        "eps": "_saved_eps",
        "training": "_saved_training",
    },
    "CudnnBatchNormBackward0": {
        "input": "_saved_input",
        "mean": "_saved_running_mean",
        "variance": "_saved_running_var",
        "eps": "_saved_epsilon",
        "training": "_saved_training",
    },
    "WeightNormInterfaceBackward0": {
        "v": "_saved_v",
        "g": "_saved_g",
        "norms": "_saved_result1",
        "axis": "_saved_dim",
    },
    "PreluKernelBackward0": {"input": "_saved_self"},
    "TrilinearBackward0": {
        "left": "_saved_i1",
        "right": "_saved_i3",
        "expand1": "_saved_expand1",
        "expand2": "_saved_expand2",
        "expand3": "_saved_expand3",
        "summed": "_saved_sumdim",
    },
    "RepeatBackward0": {"times": "_saved_repeats"},
    "MulBackward0": {"left": "_saved_self", "right": "_saved_other"},
    "AddBackward0": {"alpha": "_saved_alpha"},
    "SubBackward0": {"alpha": "_saved_alpha"},
    "MkldnnRnnLayerBackward0": {
        "input": "_saved_input",
        "mode": "_saved_mode",
        "reverse": "_saved_reverse",
        "batch_sizes": "_saved_batch_sizes",
        "has_biases": "_saved_has_biases",
        "w_ih": "_saved_weight0",
        "w_hh": "_saved_weight1",
        "b_ih": "_saved_weight2",
        "b_hh": "_saved_weight3",
        "h0": "_saved_hx_",
        "c0": "_saved_cx_",
        "output": "_saved_result0",
        "workspace": "_saved_result3",
    },
    "NllLossBackward0": _REDUCTION,
    "NllLoss2DBackward0": _REDUCTION,
    "MseLossBackward0": _REDUCTION,
    "SmoothL1LossBackward0": _REDUCTION,
    "HuberLossBackward0": _REDUCTION,
    "BinaryCrossEntropyBackward0": _REDUCTION,
    "BinaryCrossEntropyWithLogitsBackward0": _REDUCTION,
    "IndexBackward0": {"indices": "_saved_indices"},
    "IndexSelectBackward0": _AXIS | {"index": "_saved_index"},
    "IndexAddBackward0": _AXIS | {"index": "_saved_index"},
    "IndexCopyBackward0": _AXIS | {"index": "_saved_index"},
    "IndexPutBackward0": {"indices": "_saved_indices"},
    "MaskedScatterBackward0": {"index": "_saved_mask"},
    "ScatterBackward0": _AXIS | {"index": "_saved_index"},
    "ScatterAddBackward0": _AXIS | {"index": "_saved_index"},
    "AsStridedBackward0": {"size": "_saved_size", "stride": "_saved_stride", "offset": "_saved_storage_offset"},
    "AsStridedBackward1": {"size": "_saved_size", "stride": "_saved_stride", "offset": "_saved_storage_offset"},
    "ConstantPadNdBackward0": {"pads": "_saved_pad"},
    "CudnnRnnBackward0": {"batch_first": "_saved_batch_first", "batch_sizes": "_saved_batch_sizes"},
    "FftC2CBackward0": _AXES,
    "FftC2RBackward0": _AXES,
    "FftR2CBackward0": _AXES,
    "FlipBackward0": {"axes": "_saved_dims"},
    "GluBackward0": _AXIS,
    "ProdBackward1": _AXIS,
    "UnfoldBackward0": {"axis": "_saved_dimension"},
    "RollBackward0": {"axes": "_saved_dims", "shifts": "_saved_shifts"},
    "GatherBackward0": _AXIS | {"index": "_saved_index"},
    "SortBackward0": _AXIS | {"index": "_saved_indices"},
    "TopkBackward0": _AXIS | {"index": "_saved_indices"},
    "KthvalueBackward0": _AXIS,
    "MedianBackward1": _AXIS,
    "MaxBackward0": _AXIS,
    "MinBackward0": _AXIS,
    "AmaxBackward0": _AXES,
    "AminBackward0": _AXES,
    "SumBackward1": _AXES,
    "MeanBackward1": _AXES,
    "VarBackward0": _AXES,
    "StdBackward0": _AXES,
    "LinalgVectorNormBackward0": _AXES,
    "LogsumexpBackward0": _AXES,
    "SoftmaxBackward0": _AXIS,
    "LogSoftmaxBackward0": _AXIS,
    "SafeSoftmaxBackward0": _AXIS,
    "CatBackward0": _AXIS,
    "StackBackward0": _AXIS,
    "CumsumBackward0": _AXIS,
    "CumprodBackward0": _AXIS,
    "CummaxBackward0": _AXIS,
    "CumminBackward0": _AXIS,
    "LogcumsumexpBackward0": _AXIS,
    # What tells apart two nodes of one kind that only move entries; those that save nothing are all alike.
    "TransposeBackward0": {"axis": "_saved_dim0", "other": "_saved_dim1"},
    "TransposeBackward1": {"axis": "_saved_dim0", "other": "_saved_dim1"},
    "PermuteBackward0": {"axes": "_saved_dims"},
    "UnsqueezeBackward0": _AXIS,
    "UnbindBackward0": _AXIS,
    "SelectBackward0": _AXIS | {"index": "_saved_index"},
    "SliceBackward0": _AXIS | {"start": "_saved_start", "stop": "_saved_end", "step": "_saved_step"},
    "SplitBackward0": _AXIS | {"size": "_saved_split_size"},
    "SplitWithSizesBackward0": _AXIS | {"sizes": "_saved_split_sizes"},
    "UnsafeSplitBackward0": _AXIS | {"size": "_saved_split_size"},
}


@cache
def _known(kind: str) -> frozenset[str]:
    return confirmed(kind, ATTRIBUTES.get(kind, {}))


def knows(kind: str, *names: str) -> bool:
    """Whether this torch's nodes of a kind show what we call by these names, as the self-test found."""
    return _known(kind).issuperset(names)


def saved(node: Any, name: str) -> Any:
    """What a node saved under a name of ours; only for what :func:`knows` says yes to."""
    return _signed(getattr(node, ATTRIBUTES[node.name()][name]))


def _signed(value: Any) -> Any:
    """A number below zero, such as an axis counted from the last, which torch shows as one without a sign, of 64 bits."""
    if isinstance(value, tuple):
        return tuple(map(_signed, value))
    return value - 2**64 if type(value) is int and value >= 2**63 else value


def settings(node: Node) -> tuple[object, ...] | None:
    """The sizes, axes and offsets that tell two nodes of one kind apart; None if this torch does not show them all."""
    if not _shows_all(node.name()):
        return None
    values = [(name, getattr(node, name)) for name in attribute_names(type(node), "_saved_")]
    return tuple([(name, str(value)) for name, value in values if not isinstance(value, Tensor)])


def axes(node: Node) -> tuple[str, ...]:
    """The axes that a node works along, if it saved any; what no other node has, if this torch does not show them."""
    if not _shows_all(node.name()):
        return (f"unknown axes {next(_COUNTER)}",)
    return tuple([str(getattr(node, name)) for name in _axis_names(type(node))])


def axes_of_each(nodes: Iterable[Node]) -> tuple[tuple[str, ...], ...]:
    """The axes that each of these nodes works along. A steady step may ask for those of its whole graph."""
    return tuple([axes(node) if _has_axes(type(node)) else () for node in nodes])


@cache
def _has_axes(kind: type) -> bool:
    """Whether nodes of this class may work along axes; most do not."""
    return bool(_axis_names(kind)) or not _shows_all(kind.__name__)


def _shows_all(kind: str) -> bool:
    """Whether nodes of this kind, if it is one of the table's, show all that the table says."""
    return kind not in ATTRIBUTES or knows(kind, *ATTRIBUTES[kind])


@cache
def _axis_names(kind: type) -> tuple[str, ...]:
    return tuple(name for name in ("_saved_dim", "_saved_dims", "_saved_dim0", "_saved_dim1") if hasattr(kind, name))
