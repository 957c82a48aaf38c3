"""Temporary changes to the user's model, undone even when KeyboardInterrupt arrives half-way."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.utils.hooks import unserializable_hook

if TYPE_CHECKING:
    from typing_extensions import Self


@contextmanager
def restoring(action: Callable[[], None]) -> Iterator[None]:
    """Run ``action`` on leaving the block; if an interrupt breaks it off, run it again. It must be idempotent."""
    try:
        try:
            yield
        finally:
            action()
    except BaseException:
        action()
        raise


class HookScope(ABC):
    """A ``with`` block that attaches something on entry and detaches it on exit, again if an interrupt breaks that off."""

    def __enter__(self) -> Self:
        try:
            self._attach()
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            self._detach()
        except BaseException:
            self._detach()
            raise

    @abstractmethod
    def _attach(self) -> None:
        """Attach everything. If this raises, :meth:`_detach` is called."""

    @abstractmethod
    def _detach(self) -> None:
        """Remove whatever is attached; safe after a partial :meth:`_attach`, and when called twice."""


def remove_from_module(module: Any, hook: Callable[..., Any]) -> None:
    """Remove a hook from all tables of a module, which torch keys by the same number."""
    tables = [table for name, table in vars(module).items() if "hooks" in name and isinstance(table, dict)]
    # Another thread may hook the same module meanwhile, so copies of the tables are searched.
    found = [(table, key) for table in tables for key, mine in list(table.items()) if mine is hook]
    for where, key in found:
        for table in tables:
            if table is not where:
                table.pop(key, None)
        where.pop(key)  # This entry goes last, since the hook is found by it.


def nothing() -> Callable[..., None]:
    """A new function that takes anything and does nothing, and that a process without this package can unpickle."""
    return nullcontext().__exit__


# The state of a partial object that does nothing.
_DOES_NOTHING: tuple[Any, ...] = (nothing(), (), {}, None)


@unserializable_hook  # Torch would warn of it where a parameter goes to another process.
class WeakHook(partial[Any]):
    """A method of an object as a hook that does not keep the object alive.

    The object removes its hooks when it is deleted, so that the method is never called without it. A deep copy of the model has
    no such hook. A pickled model has a hook that does nothing in its place, and does not mention this package.

    Attributes:
        module: the module that has the hook, if one has it.
    """

    module: weakref.ref[Any] | None = None

    def __new__(cls, owner: object, method: str, *first: Any) -> Self:
        """The method bound to a proxy of its owner, which torch calls without another Python frame in between."""
        return super().__new__(cls, getattr(type(owner), method), weakref.proxy(owner), *first)

    def disarm(self) -> None:
        """Do nothing from now on: another thread may be about to call the hook although it was removed."""
        self.__setstate__(_DOES_NOTHING)  # type: ignore[attr-defined]  # of partial objects

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return getattr, (nullcontext(), "__exit__")

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        """A function that does nothing, and that is removed from the copied module at the end of copying.

        An entry of a table cannot be left out while the table is being copied. The module ``copy`` keeps a list in its memo of
        objects that must live until the end; what is put there is deleted last.
        """
        copied = nothing()
        module = None if self.module is None else memo.get(id(self.module()))
        if module is not None:
            memo.setdefault(id(memo), []).append(_RemovedAtTheEnd(module, copied))
        return copied


class _RemovedAtTheEnd:
    """Removes a hook from a module when this object is deleted."""

    def __init__(self, module: object, hook: Callable[..., None]):
        self._module, self._hook = module, hook

    def __del__(self) -> None:
        remove_from_module(self._module, self._hook)
