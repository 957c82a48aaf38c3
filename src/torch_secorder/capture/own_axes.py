"""Modules whose own settings tell which axis counts samples, and layers that keep the axes of their input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from torch_secorder.batch_axis.count import Count
from torch_secorder.batch_axis.placement import Layout, Placement
from torch_secorder.capture.records import Record
from torch_secorder.errors import ShapeError
from torch_secorder.model.ranks import class_as_written


@dataclass(frozen=True)
class OwnAxis:
    """The output of a module with its own batch axis; the steps along the other axis belong to one sample.

    Attributes:
        name: the module's name.
        module: the module.
        axis: its batch axis; None if it was called on one sample without such an axis.
        shape: the output's shape, ``[batch, steps, features]``, ``[steps, batch, features]`` or ``[steps, features]``.
        edge: where the output's gradient arrives.
    """

    name: str
    module: nn.Module
    axis: int | None
    shape: torch.Size
    edge: GradientEdge

    def contradicts_shapes(self, n: int) -> bool:
        """Whether there are n steps, and the batch is not a multiple of n."""
        if self.axis is None:
            return self.shape[0] == n > 1
        return self.shape[1 - self.axis] == n and self.shape[self.axis] % n != 0

    def contradicts(self, found: Placement) -> bool:
        """Whether the samples were found on the axis of the module's steps."""
        if self.axis is None:  # In a loop over samples, all steps may belong to one sample.
            return found.axis == 0 and found.layout is Layout.ONE_EACH
        return found.axis == 1 - self.axis

    def refusal(self, n: int) -> ShapeError:
        """The refusal of samples that are on another axis."""
        kind, first = class_as_written(self.module).__name__, bool(getattr(self.module, "batch_first", False))
        if self.axis is None:
            return without_batch_axis(f"{kind} '{self.name}'", f"an output of shape {tuple(self.shape)}", n)
        return ShapeError(
            f"{kind} '{self.name}' has its batch on axis {self.axis} (batch_first={first}), its steps on axis {1 - self.axis}, "
            f"where the model's {n} samples would be: if the model's inputs have their samples there, pass "
            f"batch_axis={self.axis}, or batch_axis={{'inputs': {self.axis}}} if its outputs have them first; or make the module "
            f"with batch_first={not first}; or, if the model returns a list with an item for each sample, pass "
            "batch_axis={'outputs': 'list'}"
        )


# Layers whose output has the same axes as their input, except for the last axis.
KEEPS_AXES = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.PReLU)


# Layers, with the number of axes of an input that is one sample without a batch axis.
SIDES_OF_ONE: tuple[tuple[tuple[type[nn.Module], ...], int], ...] = (
    ((nn.Linear,), 1),
    ((nn.Conv1d, nn.ConvTranspose1d), 2),
    ((nn.Conv2d, nn.ConvTranspose2d), 3),
    ((nn.Conv3d, nn.ConvTranspose3d), 4),
)


# Layers of channels, which have the samples on the first axis.
NORMS: tuple[Any, ...] = (nn.BatchNorm1d.__base__, nn.GroupNorm)


def require_first_axis(record: Record, axis: int, count: Count) -> None:
    """Raise if the samples of a layer that has them on its first axis, as far as its shape shows, were found on another one.

    Args:
        record: the layer's call.
        axis: the axis of its output on which the samples were found.
        count: the samples of the run of the model.

    Raises:
        ShapeError: naming the layer and both axes.
    """
    if record.shape[0] % (count.n or 1) == 0 and has_samples_first(record.site.module, len(record.shape)):
        raise ShapeError(
            f"{record.site} has its samples on axis 0 of its output, of shape {tuple(record.shape)}, and the model's outputs "
            f"show the model's {count} on axis {axis} of it, if they are on the axis of the outputs that is taken for theirs: "
            "say which axis of the outputs has them, as in batch_axis={'outputs': 1}"
        )


def has_samples_first(module: nn.Module, sides: int) -> bool:
    """Whether a layer of channels with an output of so many axes has the samples on the first of them."""
    if isinstance(module, NORMS):
        return True
    return any(isinstance(module, kinds) and sides > one for kinds, one in SIDES_OF_ONE if nn.Linear not in kinds)


def takes_for_one_sample(record: Record, argument: Tensor) -> bool:
    """Whether a layer took as a single sample an argument of the model whose first axis is assumed to count samples."""
    return has_one_sample(record) and takes_whole(record, argument)


def takes_whole(record: Record, argument: Tensor) -> bool:
    """Whether a layer got an argument of the model as it is."""
    x = record.inputs[0] if record.inputs else None
    if x is argument:
        return True
    if type(x) is not Tensor or type(argument) is not Tensor or x.shape != argument.shape:
        return False
    return x.untyped_storage().data_ptr() == argument.untyped_storage().data_ptr()


def has_one_sample(record: Record) -> bool:
    """Whether a layer's input has no batch axis, as told by the number of its axes."""
    x = record.inputs[0] if record.inputs else None
    sides = next((sides for kinds, sides in SIDES_OF_ONE if isinstance(record.site.module, kinds)), None)
    return isinstance(x, Tensor) and x.dim() == sides


def without_batch_axis(what: str, seen: str, n: int) -> ShapeError:
    """The refusal of a call of the model on one sample, whose first axis counts something else."""
    return ShapeError(
        f"{what} was called without a batch axis ({seen}), where axis 0 would count the model's {n} samples: pass the model one "
        "sample as a batch of one (x[None]), or pass n_samples=1"
    )


def contradicted_axis(record: Record, argument: Tensor, axis: int, *, proven: bool) -> int | None:
    """The axis on which a layer that got an argument of the model shows the samples, if it is not the given one.

    Layers of torch that keep the axes of their input have the samples on the same axis as their input. Where a layer got all of
    the given axis, its gradients were compared with that axis. Where it got a part, as one that is called for single samples
    does, they were not, and gradients that only one row has fit any other axis.

    Args:
        record: the layer's call, with its placement.
        argument: the model's argument, several of whose axes are as long as there are samples.
        axis: the axis on which it is assumed to have the samples.
        proven: whether each sample has a gradient, and the placement is the only one that explains them.
    """
    x, placement, n = record.inputs[0] if record.inputs else None, record.placement, argument.shape[axis]
    if type(x) is not Tensor or type(argument) is not Tensor or not isinstance(record.site.module, KEEPS_AXES):
        return None
    if placement is None or placement.layout is not Layout.ONE_EACH:
        return None
    sides = min(x.dim(), len(record.shape))
    if x.dim() != argument.dim() or placement.axis >= sides or x.shape[placement.axis] != n:
        return None
    # The layer may have got the argument transposed: its axes are told by their strides. In most steps they tell of the same one.
    if x.stride(placement.axis) == argument.stride(axis):
        return None
    if x.untyped_storage().data_ptr() != argument.untyped_storage().data_ptr():
        return None
    ways = [(size, stride) for size, stride in zip(argument.shape, argument.stride(), strict=True)]
    own = (n, x.stride(placement.axis))
    if ways.count(own) != 1:
        return None
    if not proven and ways[axis] not in zip(x.shape, x.stride(), strict=True):
        return None
    return ways.index(own)
