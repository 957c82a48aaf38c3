"""In which precision sums are taken: in double precision on the device, or on the host where the device has none.

Apple's GPUs have no float64, nor have some of Intel's. There, what is short goes to the host as it is, and what is long is
summed in rows on the device before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, reduce

import torch
from torch import Tensor

# A row of so many numbers keeps its digits in single precision: torch adds in pairs, so that rounding grows with the logarithm.
ROW = 4096

# Tensors of one shape that are on the host already and have so few numbers are converted in one operation, since each costs more
# than its numbers do.
FEW = 4096


@cache
def has_double_precision(device: torch.device) -> bool:
    """Whether a device computes in float64, which making a number tells."""
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (RuntimeError, TypeError):
        return False
    return True


def widest_dtype(device: torch.device) -> torch.dtype:
    """The dtype for sums that have to stay on a device."""
    return torch.float64 if has_double_precision(device) else torch.float32


def on_host(value: Tensor) -> Tensor:
    """A tensor in float64 on the host; it is copied before it is converted, since its device may not have such numbers."""
    return value.detach().cpu().double()


def in_double_precision(value: Tensor) -> Tensor:
    """A tensor in float64, on its device or else on the host."""
    return value.double() if has_double_precision(value.device) else value.cpu().double()


def together_on_host(values: Sequence[Tensor]) -> list[Tensor]:
    """Tensors in float64 on the host, to which those of one device go in one copy, so that the host waits once."""
    on_device: dict[torch.device, list[int]] = {}
    alike: dict[tuple[torch.dtype, torch.Size], list[int]] = {}
    found = list(values)
    for index, value in enumerate(values):
        if value.device.type != "cpu":
            on_device.setdefault(value.device, []).append(index)
        elif value.numel() > FEW:
            found[index] = on_host(value)
        else:
            alike.setdefault((value.dtype, value.shape), []).append(index)
    for several in alike.values():
        for index, part in zip(several, on_host(torch.stack([values[index] for index in several])), strict=True):
            found[index] = part
    for several in on_device.values():
        dtype = reduce(torch.promote_types, [values[index].dtype for index in several])
        together = torch.cat([values[index].detach().flatten().to(dtype) for index in several])
        parts = on_host(together).split([values[index].numel() for index in several])
        for index, part in zip(several, parts, strict=True):
            found[index] = part.view(values[index].shape)
    return found


def in_parts(value: Tensor) -> list[Tensor]:
    """All numbers of a tensor, in rows whose sums keep their digits: a single one on a device that has float64."""
    flat = value.flatten()
    if has_double_precision(value.device):
        return [flat[None]]
    whole = len(flat) // ROW * ROW
    return [flat[:whole].unflatten(0, (-1, ROW)), flat[None, whole:]]


def sum_in_double_precision(value: Tensor, factor: Tensor | None = None) -> Tensor:
    """The sum of a tensor, or of its product with another of its shape, in float64: on its device or else on the host."""
    if has_double_precision(value.device):
        return value.double().sum() if factor is None else (value.double() * factor.double()).sum()
    terms = (value if factor is None else value.float() * factor.float()).float()
    return torch.cat([part.sum(1) for part in in_parts(terms)]).cpu().double().sum()
