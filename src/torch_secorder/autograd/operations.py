"""The operations that run in a block, also those that no function of torch's Python interface has called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class OperationWatch(TorchDispatchMode):
    """A mode that tells of each operation in this thread before it runs, those of scripted functions and extensions too.

    Args:
        on_operation: what is called.
    """

    def __init__(self, on_operation: Callable[[], None]):
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not type it.
        self._on_operation = on_operation

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._on_operation()
        return operation(*args, **(kwargs or {}))
