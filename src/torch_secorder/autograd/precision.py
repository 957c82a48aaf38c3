"""Half precision: which dtypes have it, and whether autocast or the autograd graph brings it in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.autograd.graph import Node

HALF = (torch.float16, torch.bfloat16)

# What torch calls the device type that somebody else's package provides.
_private_backend: Callable[[], str] = torch._C._get_privateuse1_backend_name

# The device types for which some release of torch has had autocast. The name of a private backend is asked for.
_DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "xla", "ipu")


def is_half(x: Tensor) -> bool:
    """Whether a tensor has half precision."""
    return x.dtype in HALF


def autocast_devices() -> list[str]:
    """The device types on which autocast is on."""
    return list(filter(torch.is_autocast_enabled, _devices_with_autocast(_private_backend())))


def full_precision() -> ExitStack:
    """A context without autocast, so that sums taken inside an autocast block keep the precision of what is summed."""
    stack = ExitStack()
    for device in autocast_devices():
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def autocast_of_now() -> Callable[[], ExitStack]:
    """What opens a context with the autocast that is on now, so that a layer can be called again as it was called."""
    on = [(device, torch.get_autocast_dtype(device)) for device in autocast_devices()]

    def again() -> ExitStack:
        stack = ExitStack()
        for device, dtype in on:
            stack.enter_context(torch.autocast(device, dtype))
        return stack

    return again


@contextmanager
def deterministic_convolutions() -> Iterator[None]:
    """A block in which cuDNN takes the same numbers for the same convolution each time.

    Its other algorithms add up parts in any order, and in TF32, which is the default, each part is rounded to 11 bits.
    """
    before = torch._C._get_cudnn_deterministic()
    torch._C._set_cudnn_deterministic(True)
    try:
        yield
    finally:
        torch._C._set_cudnn_deterministic(before)


def has_half_precision(*values: Tensor) -> bool:
    """Whether half precision takes part in how these tensors are, or were, computed.

    Autocast tells, and so do the dtypes of the tensors and of all that the autograd graph behind them passes on: a model that
    runs under autocast may well return float32. (What re-entrant checkpointing hides is not seen; autocast around it is.)
    """
    return bool(autocast_devices()) or any(map(is_half, values)) or not _graph_dtypes(values).isdisjoint(HALF)


def _graph_dtypes(roots: tuple[Tensor, ...]) -> set[torch.dtype]:
    """The dtypes of all gradients that a backward pass from these tensors would bring to some node."""
    return {output.dtype for node in nodes_of(roots) for output in node._input_metadata}


def nodes_of(roots: Sequence[Tensor]) -> set[Node]:
    """All nodes of the graph behind some tensors."""
    stack = [x.grad_fn for x in roots if x.grad_fn is not None]
    seen = set(stack)
    while stack:
        for child, _ in stack.pop().next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    return seen


@cache
def _devices_with_autocast(private_backend: str) -> tuple[str, ...]:
    return tuple(device for device in (*_DEVICE_TYPES, private_backend) if _has_autocast(device))


def _has_autocast(device: str) -> bool:
    try:
        return torch.amp.is_autocast_available(device)
    except RuntimeError:  # a device type that this torch does not know
        return False
