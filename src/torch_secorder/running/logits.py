"""The outputs and targets that a likelihood takes, with the samples first."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torch_secorder.batch_axis.samples import BatchSamples
from torch_secorder.errors import ArgumentError, UnsupportedError
from torch_secorder.running.loss import require_targets_of_batch


def with_samples_first(outputs: Tensor, targets: Any, samples: BatchSamples) -> tuple[Tensor, Any]:
    """Outputs and targets as a likelihood takes them.

    Raises:
        UnsupportedError: if the rows of the outputs are something else than samples.
    """
    require_targets_of_batch(targets, samples)
    placement = samples.of(outputs, "outputs")
    if placement is not None and placement.sample_index is not None:
        raise UnsupportedError(
            "the Fisher of the model's own labels takes outputs with the samples on an axis of their own, not a row for "
            'something else: pad them to (N, T, ...) in the model\'s forward, or use fisher="empirical"'
        )
    axis = 0 if placement is None else placement.axis
    if isinstance(targets, Tensor) and (found := samples.of(targets, "targets")) is not None:
        targets = targets.movedim(found.axis, 0)
    return outputs.movedim(axis, 0) if axis else outputs, targets


def logits(outputs: Any) -> Tensor:
    """The tensor that the likelihood takes: the outputs, or their ``logits``."""
    found = _logits(outputs)
    if found.is_complex():
        raise UnsupportedError("a likelihood takes real outputs, not complex ones: return torch.view_as_real(outputs)")
    return found


def _logits(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    found = outputs.get("logits") if hasattr(outputs, "get") else getattr(outputs, "logits", None)
    if found is None and isinstance(outputs, (tuple, list)) and outputs and isinstance(outputs[0], Tensor):
        found = outputs[0]
    if not isinstance(found, Tensor):
        raise ArgumentError(f"the model returned a {type(outputs).__name__} without logits; return a tensor of outputs")
    return found
