"""The functions of torch that keep samples apart, with the place of the samples in what each of them returns.

A tensor keeps samples apart along an axis if each index on that axis has been computed from one sample's outputs. A sum over
samples, such as a mean loss, has no such axis any more; it stays separable under functions that are linear in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_secorder.model.containers import tensors

# The place of the samples in a tensor: an axis, or SUM for a sum over samples. UNKNOWN is said of everything else.
Place = int
SUM, UNKNOWN = -1, -2
Arguments = tuple[Sequence[Any], Mapping[str, Any]]  # all but the tensor that is followed
# From the place in the tensor, the tensor, the arguments and the result to the place in the result.
Rule = Callable[[Place, Tensor, Arguments, Tensor], Place]


def _after_linear(place: Place, x: Tensor, others: Arguments, result: Tensor) -> Place:
    """A function of each entry that is linear in it, up to a constant; a sum over samples stays one."""
    return place if result.shape == x.shape and result.is_floating_point() else UNKNOWN


def _after_entries(place: Place, x: Tensor, others: Arguments, result: Tensor) -> Place:
    """A function of each entry by itself, and of the entries of constant tensors in the same places."""
    return UNKNOWN if place == SUM else _after_linear(place, x, others, result)


def _after_sum(place: Place, x: Tensor, others: Arguments, result: Tensor) -> Place:
    """A sum or a mean of all entries, or along axes other than that of the samples."""
    args, kwargs = others
    if not set(kwargs) <= {"dim"}:
        return UNKNOWN  # such as another dtype, keepdim or out
    axes = args[0] if args else kwargs.get("dim")
    if axes is None or place == SUM:
        return SUM if not result.dim() else UNKNOWN
    summed = {axis % x.dim() for axis in (axes if isinstance(axes, (tuple, list)) else (axes,))}
    if not summed or place in summed or len(args) > 1 or result.dim() != x.dim() - len(summed):
        return UNKNOWN
    return place - sum(axis < place for axis in summed)


def _after_reshaping(place: Place, x: Tensor, others: Arguments, result: Tensor) -> Place:
    """The same entries in the same order; each new index has entries of one sample if it has a part of an old index."""
    if place or result.numel() != x.numel() or not x.numel() or result.dtype != x.dtype or not result.dim():
        return UNKNOWN
    of_one_sample, of_one_index = x.numel() // x.shape[0], x.numel() // result.shape[0]
    return UNKNOWN if of_one_sample % of_one_index else 0


def _after_transposition(place: Place, x: Tensor, others: Arguments, result: Tensor) -> Place:
    """Two axes changed places, and neither is that of the samples."""
    args, kwargs = others
    moved = {axis % x.dim() for axis in (*args, *kwargs.values())}
    return UNKNOWN if place in (SUM, *moved) else place


def _after_slicing(place: Place, x: Tensor, others: Arguments, result: Tensor) -> Place:
    """A part of the tensor, by slices and numbers; the first axis, of the samples, is sliced at most."""
    index = others[0][0] if isinstance(others[0][0], tuple) else (others[0][0],)
    if place or not index or not all(isinstance(part, (slice, int, type(...), type(None))) for part in index):
        return UNKNOWN
    named = sum(isinstance(part, (slice, int)) for part in index)
    keeps_first = isinstance(index[0], slice) or (index[0] is ... and named < x.dim())
    return 0 if keeps_first and not any(isinstance(part, bool) for part in index) else UNKNOWN


def _after_softmax(place: Place, x: Tensor, others: Arguments, result: Tensor) -> Place:
    """A function along an axis other than that of the samples."""
    args, kwargs = others
    axis = kwargs["dim"] if "dim" in kwargs else args[0] if args else None
    if place == SUM or not isinstance(axis, int) or axis % x.dim() == place or result.shape != x.shape:
        return UNKNOWN
    return place


def _after_loss_of_entries(place: Place, x: Tensor, others: Arguments, result: Tensor) -> Place:
    """A loss of each entry, with constant targets and weights that are not broadcast beyond the outputs; maybe averaged."""
    shapes = [other.shape for other in tensors([list(others[0]), dict(others[1])])]
    if place == SUM or torch.broadcast_shapes(x.shape, *shapes) != x.shape:
        return UNKNOWN
    return place if result.shape == x.shape else SUM if not result.dim() else UNKNOWN


def _after_loss_of_classes(place: Place, x: Tensor, others: Arguments, result: Tensor) -> Place:
    """A loss of the classes on axis 1 at each place of the other axes, with constant targets and weights; maybe averaged."""
    if x.dim() < 2 or place in (SUM, 1):
        return UNKNOWN
    if not result.dim():
        return SUM
    return place - (place > 1) if math.prod(result.shape) * x.shape[1] == x.numel() else UNKNOWN


def _rules() -> dict[Any, Rule]:
    """Function of torch -> its rule."""
    methods: dict[Rule, str] = {
        _after_linear: "float double to clone contiguous neg mul div add sub",
        _after_entries: "exp log log1p abs square sqrt sigmoid tanh relu clamp pow",
        _after_sum: "sum mean",
        _after_reshaping: "flatten reshape view unflatten squeeze unsqueeze",
        _after_transposition: "transpose",
        _after_slicing: "__getitem__",
        _after_softmax: "softmax log_softmax",
    }
    functions: dict[Rule, str] = {
        _after_entries: "relu sigmoid logsigmoid softplus",
        _after_softmax: "softmax log_softmax",
        _after_loss_of_entries: "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy "
        "binary_cross_entropy_with_logits poisson_nll_loss soft_margin_loss",
        _after_loss_of_classes: "cross_entropy nll_loss",
    }
    found: dict[Any, Rule] = {getattr(F, name): rule for rule, names in functions.items() for name in names.split()}
    for owner in (torch, Tensor):
        found |= {
            getattr(owner, n): rule for rule, names in methods.items() for n in names.split() if hasattr(owner, n)
        }
    return found


RULES = _rules()
# What says nothing of a tensor's entries, as functions and as attributes.
_OF_SHAPES = ["size", "dim", "ndimension", "numel", "nelement", "__len__", "is_floating_point", "is_complex"]
OF_SHAPES = {getattr(Tensor, name) for name in _OF_SHAPES}
SHAPES = [Tensor.shape, Tensor.dtype, Tensor.device, Tensor.ndim, Tensor.requires_grad]
