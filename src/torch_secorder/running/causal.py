"""Causal language models, whose output at one position predicts the label at the next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from torch_secorder.errors import ArgumentError, ShapeError
from torch_secorder.likelihoods import axis_of_classes

IGNORED = -100  # the label of a position that has none, as torch's cross-entropy has it


def causal_labels(targets: Any, ignore_index: int = IGNORED) -> Any:
    """The labels of a batch, not shifted: its ``labels``, or else its ``input_ids`` where ``attention_mask`` does not hide them.

    Args:
        targets: a batch as a mapping; anything else is returned as it is.
        ignore_index: the label of positions that the mask hides.

    Raises:
        ArgumentError: if the mapping has neither labels nor input_ids.
    """
    if not isinstance(targets, Mapping):
        return targets
    if targets.get("labels") is not None:
        return targets["labels"]
    if not isinstance(ids := targets.get("input_ids"), Tensor):
        raise ArgumentError(
            f"the batch has neither labels nor input_ids, but {', '.join(map(str, targets))}: labels= names the entry that has "
            "the labels"
        )
    mask = targets.get("attention_mask")
    return ids if mask is None else torch.where(mask.bool(), ids, ignore_index)


def shifted(outputs: Tensor, targets: Any, class_axis: int) -> tuple[Tensor, Any, int]:
    """Outputs that predict something, the targets that they predict, and the axis that counts positions.

    Raises:
        ArgumentError: if there is no such axis of classes.
        ShapeError: if there are no positions, or none that predicts another.
    """
    if outputs.dim() != 3:
        raise ShapeError(
            f"shift=True takes logits of three axes, such as (samples, positions, classes), not of shape {tuple(outputs.shape)}"
        )
    axis = 3 - axis_of_classes(outputs, class_axis)
    if outputs.shape[axis] < 2:
        raise ShapeError(
            f"shift=True takes sequences of two positions or more, and these outputs of shape {tuple(outputs.shape)} have one: "
            "class_axis= says which axis has the classes"
        )
    positions = (len(outputs), outputs.shape[axis])
    if isinstance(targets, Tensor) and tuple(targets.shape) != positions:
        raise ShapeError(
            f"labels of shape {tuple(targets.shape)} for outputs of shape {tuple(outputs.shape)} with class_axis={class_axis}: "
            f"expected {positions}" + ("; they fit class_axis=-1" if targets.shape == outputs.shape[:2] else "")
        )
    predicting = outputs.narrow(axis, 0, outputs.shape[axis] - 1)
    return predicting, targets[:, 1:] if isinstance(targets, Tensor) else targets, axis


def unshifted(gradients: Iterator[Tensor], axis: int) -> Iterator[Tensor]:
    """The same gradients for all positions: zero at the last, which predicts nothing."""
    for gradient in gradients:
        yield torch.cat([gradient, torch.zeros_like(gradient.narrow(axis, 0, 1))], axis)
