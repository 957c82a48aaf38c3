"""The tables in which torch keeps the hooks of modules and tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from torch_secorder.model.hooks import WeakHook, remove_from_tables

Owner = nn.Module | Tensor


# The tables of hooks that every module has.
_TABLES = [name for name, table in vars(nn.Module()).items() if "hooks" in name and isinstance(table, dict)]
_tables_of = attrgetter(*_TABLES)


def hook_counts(module: nn.Module) -> Iterable[int]:
    """How many hooks a module has in each of its tables."""
    return map(len, _tables_of(module))


class HookSet:
    """Hooks of ours on modules and tensors.

    They are found again where they are, and not by the handles that torch gave: an interruption between the moment when a
    hook is there and the one when its handle is kept, a Ctrl-C say, would leave it on the user's model for good. An interruption
    at the first instruction of ``__exit__`` is the one that no block can help; then they go with whoever held them.
    """

    def __init__(self) -> None:
        self._ours: list[tuple[Owner, Callable[..., Any]]] = []

    def add(self, owner: Owner, register: Callable[..., object], hook: Callable[..., Any], **options: bool) -> None:
        """Have ``register(hook, **options)`` put a hook on ``owner``."""
        self._ours.append((owner, hook))
        if isinstance(hook, WeakHook) and not isinstance(owner, Tensor):
            hook.module = weakref.ref(owner)
        register(hook, **options)

    def remove(self) -> None:
        """Take them all off."""
        for owner, hook in self._ours:
            _remove(owner, hook)
            if isinstance(hook, WeakHook):
                hook.disarm()
        self._ours = []

    def __del__(self) -> None:
        if hasattr(self, "_ours"):  # torch's compiler makes objects that it never initializes.
            self.remove()


def _remove(owner: Owner, hook: Callable[..., Any]) -> None:
    """Remove one hook from all tables of its owner."""
    if isinstance(owner, Tensor):
        remove_from_tables([owner._backward_hooks or {}], hook)
    else:
        remove_from_tables([table for table in map(vars(owner).get, _TABLES) if table], hook)


# The hooks for a tensor's gradient by their numbers; None if it never had one. (A Python function would double what it costs to
# read this for each parameter of each step.)
gradient_hooks: Callable[[Tensor], dict[int, Any] | None] = attrgetter("_backward_hooks")
