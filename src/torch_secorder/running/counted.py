"""Which positions of the outputs have a label, if a batch is a mapping and the user names none of its entries as targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torch_secorder.errors import ShapeError
from torch_secorder.likelihoods import axis_of_classes


def counted_labels(targets: Any, outputs: Tensor, class_axis: int, ignore_index: int) -> Any:
    """Targets that are ``ignore_index`` at positions that do not count, for a Fisher of the model's own labels.

    The ``labels`` of a mapping show these positions if they have a label for each position. Otherwise its ``attention_mask``
    does, or the ``decoder_attention_mask`` for a decoder with inputs of its own.

    Args:
        targets: the batch's targets. Anything but a mapping is returned as it is; a mapping gives None if all positions count.
        outputs: logits with the samples on axis 0.
        class_axis: the axis of the classes.
        ignore_index: the label of positions that have none.

    Raises:
        ArgumentError: if there is no such axis of classes.
        ShapeError: if the mask hides positions but has another shape than the outputs' positions.
    """
    if not isinstance(targets, Mapping):
        return targets
    classes = axis_of_classes(outputs, class_axis)
    positions = tuple(size for axis, size in enumerate(outputs.shape) if axis != classes)
    labels = targets.get("labels")
    if isinstance(labels, Tensor) and not labels.is_floating_point() and tuple(labels.shape) == positions:
        return labels
    name = _mask_of(targets)
    mask = targets.get(name)
    if not isinstance(mask, Tensor) or len(positions) < 2 or bool(mask.bool().all()):
        return None
    if tuple(mask.shape) != positions:
        raise ShapeError(
            f"the batch's {name} of shape {tuple(mask.shape)} hides positions, and the outputs have the positions {positions}, "
            f"so that it does not say which of them count: labels= names an entry that does, {ignore_index} where nothing counts"
        )
    return torch.zeros_like(mask, dtype=torch.long).masked_fill(~mask.bool(), ignore_index)


def has_mask(batch: Any) -> bool:
    """Whether a batch, or a model's inputs, say which of their positions are padding."""
    return isinstance(batch, Mapping) and isinstance(batch.get(_mask_of(batch)), Tensor)


def _mask_of(batch: Mapping[str, Any]) -> str:
    """The name of the mask that describes the outputs' positions."""
    return "decoder_attention_mask" if batch.get("decoder_input_ids") is not None else "attention_mask"
