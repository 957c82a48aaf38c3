"""Batches are brought to the device that the model is on."""

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

    By default the device is that of all parameters. Then values are moved only from the host to an accelerator, and only if all
    of their tensors are on the host: a user who moves inputs has reasons to leave lengths there.

    Args:
        parameters: the model's.
        device: the device to bring them to; None for the parameters' device.

    Raises:
        ArgumentError: for an invalid device.
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
    if isinstance(values, Tensor):  # A copy from a device to the host is read at once.
        return values.to(device, non_blocking=values.device.type == "cpu")
    if is_packed(values):  # its lengths stay on the host
        return values.to(device, non_blocking=True)
    return with_parts(lambda _, part: _moved(part, device), values)
