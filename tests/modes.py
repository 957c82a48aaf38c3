"""Modes that see the library's own operations, too, which it hides from modes of the user's."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from torch.utils._python_dispatch import TorchDispatchMode

from torch_secorder.autograd import engine


class ModeInside(TorchDispatchMode):
    """A mode from which nothing is hidden: while it is on, the library takes it that no mode is."""

    def __enter__(self) -> Any:
        self._patches = [*getattr(self, "_patches", []), patch.object(engine, "active_modes", lambda: 0)]
        self._patches[-1].start()
        return super().__enter__()

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        self._patches.pop().stop()
