"""The global random state, of the CPU and of accelerators of any kind; torch's own fork knows one kind at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def forked_random(tensors: Iterable[Tensor] = ()) -> Iterator[None]:
    """A block whose random draws leave the global random state as it was, also on the devices of these tensors."""
    devices = {x.device for x in tensors if x.device.type != "cpu"}
    found = [(device, module) for device in devices if (module := _random_module(device)) is not None]
    before = [module.get_rng_state(*_named(device)) for device, module in found]
    with torch.random.fork_rng(()):
        try:
            yield
        finally:
            for (device, module), state in zip(found, before, strict=True):
                module.set_rng_state(state, *_named(device))


def random_state() -> list[Tensor]:
    """The state of every global random generator in use: of the CPU, and of each accelerator of this machine."""
    module = _module_in_use()
    if module is None:
        return [torch.get_rng_state()]
    several = module.get_rng_state_all() if hasattr(module, "get_rng_state_all") else [module.get_rng_state()]
    return [torch.get_rng_state(), *several]


def set_random_state(states: Sequence[Tensor]) -> None:
    """Put back what :func:`random_state` gave."""
    torch.set_rng_state(states[0])
    if (module := _module_in_use()) is None or len(states) == 1:
        return
    if hasattr(module, "set_rng_state_all"):
        module.set_rng_state_all(states[1:])
    else:
        module.set_rng_state(states[1])


def _random_module(device: torch.device) -> Any:
    """Torch's module for a kind of device, if it has random numbers of its own."""
    module = getattr(torch, device.type, None)
    return module if hasattr(module, "get_rng_state") and hasattr(module, "set_rng_state") else None


def _named(device: torch.device) -> tuple[torch.device, ...]:
    """What names a device to its module: Apple's has only one, and takes no name."""
    return () if device.type == "mps" else (device,)


def _module_in_use() -> Any:
    """The module of this machine's accelerators, if they are in use and have random numbers."""
    device = torch.accelerator.current_accelerator()
    module = None if device is None else _random_module(device)
    return module if module is not None and getattr(module, "is_initialized", lambda: True)() else None
