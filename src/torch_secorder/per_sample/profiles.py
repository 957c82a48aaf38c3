"""What is cheap on a device: a CPU has caches and starts work at once; an accelerator does neither."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DeviceProfile:
    """The facts that decide between algorithms and set the size of temporaries.

    Attributes:
        chunk_bytes: how many bytes the temporaries of an operation usually take at once.
        convolution_bytes: the same for those of a convolution's gradients.
        has_caches: whether temporaries that stay small are worth more calls.
        price_of_a_write: the cost of writing an element and reading it again, in multiplications of a matrix product.
    """

    chunk_bytes: int
    convolution_bytes: int
    has_caches: bool
    price_of_a_write: int


# Temporaries of these sizes stay in the last-level cache of common machines, and the allocator reuses them. The price was
# measured on one core in single precision.
CPU = DeviceProfile(8 * 2**20, 4 * 2**20, has_caches=True, price_of_a_write=20)
# The price was not measured but computed for single precision from makers' data, 8 bytes at 2 TB/s against 2e13 multiplications
# a second. Temporaries may take a small part of the memory that such devices have.
ACCELERATOR = DeviceProfile(2**28, 2**28, has_caches=False, price_of_a_write=80)


def profile_of(device: torch.device) -> DeviceProfile:
    """The profile of a device."""
    return CPU if device.type == "cpu" else ACCELERATOR
