"""How torch is told of the device: once in a process, since it can't be taken back."""

from __future__ import annotations

import atexit
import ctypes
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _DummyPrivateUse1Hook, _setup_privateuseone_for_python_backend

from pretend.autocast import register_autocast
from pretend.counting import waited
from pretend.recurrence import register_cells
from pretend.tensor import NAME, factory, run

# Errors that a hook raised in the device thread while torch's C++ code asked our guard for the device.
_errors: deque[BaseException] = deque()
# Any function of Python's own: what is called through `pythonapi` raises an error that is on its way already.
_raise_what_is_on_its_way = ctypes.pythonapi.Py_IsInitialized


class Module:
    """What stands under ``torch.pretend``."""

    _initialized = True

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        """One, whose random state is all that there is: ``torch.random.fork_rng()`` warns of more."""
        return 1

    def synchronize(self, device: Any = None) -> None:
        waited("synchronize")

    def manual_seed(self, seed: int) -> None:
        """Its random numbers are the CPU's, whose generator was seeded already."""

    manual_seed_all = manual_seed

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    @contextmanager
    def device(self, index: Any) -> Iterator[None]:
        yield

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class Guard(torch._C._acc.DeviceGuard):
    """Tells C++ code which type of device this is, also while an error is on its way.

    C++ asks it when a backward pass is left through an error. Python can't be called with an error pending, so that the process
    would be aborted; the error is put aside, and raised by :class:`Engine`.
    """

    _type = torch._C._autograd.DeviceType.PrivateUse1

    def type_(self) -> Any:
        try:
            _raise_what_is_on_its_way()
        except BaseException as error:
            _errors.append(error)
        return self._type


class Engine:
    """Autograd's engine, which raises the errors that :class:`Guard` put aside."""

    def __init__(self, engine: Any):
        self._engine = engine

    def run_backward(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._engine.run_backward(*args, **kwargs)
        except SystemError:
            if not _errors:
                raise
            raise _errors.popleft() from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@cache
def register() -> None:
    """Make ``torch.device("pretend")`` exist, in this process and for good."""
    _setup_privateuseone_for_python_backend(NAME, Module(), _DummyPrivateUse1Hook(), Guard())
    torch.autograd.Variable._execution_engine = Engine(torch.autograd.Variable._execution_engine)
    library = torch.library.Library("aten", "IMPL")
    _libraries.append(library)
    for name, operation in _factories():
        library.impl(name, factory(operation), "PrivateUse1")
    copy = torch.ops.aten._copy_from.default
    library.impl("_copy_from", lambda *args, **kwargs: run(copy, args, kwargs), "PrivateUse1")
    _libraries.extend([*register_autocast(NAME), register_cells()])
    # The device thread may still have tensors to let go of, for which it needs the interpreter; later it would abort.
    atexit.register(time.sleep, 0.05)


_libraries: list[torch.library.Library] = []  # what they hold is there as long as they are


def _factories() -> Iterator[tuple[str, Any]]:
    """All of torch's operations that take a device and no tensor."""
    for full in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = full.partition("::")
        name, _, overload = rest.partition(".")
        if namespace != "aten" or not hasattr(torch.ops.aten, name):
            continue
        packet = getattr(torch.ops.aten, name)
        if (overload or "default") not in packet.overloads():
            continue
        operation = getattr(packet, overload or "default")
        arguments = operation._schema.arguments
        if any(a.name == "device" for a in arguments) and not any("Tensor" in str(a.type) for a in arguments):
            yield rest, operation
