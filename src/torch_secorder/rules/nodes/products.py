"""Matrices that multiply data: products of two matrices, of stacks of them, and bilinear maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_secorder.autograd.saved import saved
from torch_secorder.per_sample import Outer, PerSampleGradient, Routed
from torch_secorder.rules.bilinear import pairs
from torch_secorder.rules.node_rules import NodeUse, in_rows, node_rule, times


def _rows_times(x: Tensor, g: Tensor, shape: tuple[int, ...]) -> Outer:
    """The gradient ``x^T g`` of the right factor of a matrix product."""
    return Outer(g[:, None, None], x.to(g.dtype)[:, None, None], shape)


def _times_columns(g: Tensor, x: Tensor, shape: tuple[int, ...]) -> Outer:
    """The gradient ``g x^T`` of the left factor of a matrix product."""
    return Outer(x.to(g.dtype).mT[:, None, None], g.mT[:, None, None], shape)


def _is_factor(at: NodeUse, left: int) -> bool:
    """Whether a value is the left factor (input ``left``) with samples in columns, or the right one with samples in rows."""
    axis = at.placement.axis - (len(at.output_shape) - 2)
    return (at.index, axis) in ((left, 1), (left + 1, 0))


@node_rule(
    "AddmmBackward0",
    lambda at: at.is_broadcast if at.index == 0 else _is_factor(at, 1),
    reads=("alpha", "beta", "left", "right"),
)
def addmm(at: NodeUse, g: Tensor) -> PerSampleGradient | Tensor:
    """``beta self + alpha mat1 mat2`` with samples in the rows or in the columns of the result."""
    if at.index == 0:
        return at.summed(times(saved(at.node, "beta"), g))
    g = times(saved(at.node, "alpha"), g)
    if at.index == 1:
        return _times_columns(g, saved(at.node, "right"), at.shape)
    return _rows_times(saved(at.node, "left"), g, at.shape)


@node_rule("MmBackward0", lambda at: _is_factor(at, 0), reads=("left", "right"))
def mm(at: NodeUse, g: Tensor) -> PerSampleGradient:
    """``self mat2`` with samples in the rows or in the columns of the result."""
    if at.index == 0:
        return _times_columns(g, saved(at.node, "right"), at.shape)
    return _rows_times(saved(at.node, "left"), g, at.shape)


@node_rule("BmmBackward0", lambda at: _is_factor(at, 0), reads=("left", "right"))
def bmm(at: NodeUse, g: Tensor) -> PerSampleGradient:
    """``self mat2`` for several matrices, with samples in the rows or columns of each result; einsum is made of these."""
    if at.index == 0:
        g, x = (value.permute(2, 0, 1)[:, :, None] for value in (g, saved(at.node, "right").to(g.dtype)))
        return Outer(x, g, at.shape)
    g, x = (value.transpose(0, 1)[:, :, None] for value in (g, saved(at.node, "left").to(g.dtype)))
    return Outer(g, x, at.shape)


@node_rule("MvBackward0", in_rows(1), reads=("left",))
def mv(at: NodeUse, g: Tensor) -> Tensor:
    """``self vec`` with samples in the rows of the matrix."""
    return g[:, None] * saved(at.node, "left").to(g.dtype)


def _is_stack(at: NodeUse) -> bool:
    """Whether a value is a stack of matrices, one of which multiplies each row of the other factor."""
    return in_rows(1)(at) and len(at.shape) == 3 and len(at.output_shape) == 2


@node_rule("GroupedMmBackward0", _is_stack, reads=("left", "ends"))
def grouped_mm(at: NodeUse, g: Tensor) -> PerSampleGradient:
    """The rows of a matrix times a stack of matrices, each of which multiplies a run of rows, as experts do."""
    ends, rows = saved(at.node, "ends").long(), torch.arange(len(g), device=g.device)
    matrix = torch.searchsorted(ends, rows, right=True)
    used = (matrix < len(ends)).nonzero().squeeze(1)  # Rows behind the last end are multiplied by nothing.
    x = saved(at.node, "left").to(g.dtype)
    return Routed(g[used], x[used], matrix[used], used, len(g), at.shape)


def _is_bilinear(node: Any) -> bool:
    expanded = ("expand1", "expand2", "expand3", "summed")
    return [list(saved(node, name)) for name in expanded] == [[1, 3], [0], [1, 2], [2, 3]]


@node_rule(
    "TrilinearBackward0",
    lambda at: in_rows(1)(at) and _is_bilinear(at.node),
    reads=("left", "right", "expand1", "expand2", "expand3", "summed"),
)
def bilinear(at: NodeUse, g: Tensor) -> PerSampleGradient:
    """The weight of ``y_o = x1^T W_o x2``."""
    return Outer(pairs(saved(at.node, "left"), saved(at.node, "right"))[:, None, None], g[:, None, None], at.shape)
