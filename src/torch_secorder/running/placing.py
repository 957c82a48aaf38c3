"""Batches come to where the model is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_secorder.errors import ArgumentError
from torch_secorder.model.containers import is_packed, tensors, with_parts

Device = torch.device | str | int | None


class Placing:
    """Brings the inputs and the targets of a batch to a device, without waiting for the copies.

    Where nobody said which device, it is that of all parameters. Only what lies on the host is brought to an accelerator
    then, and only if nothing beside it is there: a user who moves inputs has reasons to leave lengths on the host.

    Args:
        parameters: the model's.
        device: where to; None for where the parameters are.

    Raises:
        ArgumentError: for a device that is none.
    """

    def __init__(self, parameters: Sequence[Tensor], device: Device = None):
        self._asked = device is not None
        found = {p.device for p in parameters}
        self._device = _device(device) if device is not None else found.pop() if len(found) == 1 else None

    def __call__(self, values: Any) -> Any:
        """The same inputs or targets, nested as they are."""
        device = self._device
        if device is None or (not self._asked and _are_left(values, device)):
            return values
        return _moved(values, device)


def _are_left(values: Any, device: torch.device) -> bool:
    return device.type in ("cpu", "meta") or any(x.device.type != "cpu" for x in tensors(values))


def _device(device: torch.device | str | int) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"device must be one of torch's, not {device!r}") from error


def _moved(values: Any, device: torch.device) -> Any:
    if isinstance(values, Tensor):  # What comes from a device to the host is read at once.
        return values.to(device, non_blocking=values.device.type == "cpu")
    if is_packed(values):  # its lengths stay on the host
        return values.to(device, non_blocking=True)
    return with_parts(lambda _, part: _moved(part, device), values)
