"""What was changed for a while is put back, at whatever moment something interrupts: hooks on the user's model, for one."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self


@contextmanager
def restoring(action: Callable[[], None]) -> Iterator[None]:
    """A block after which ``action`` is done whatever happens, once more if that is interrupted: it may be done twice."""
    try:
        try:
            yield
        finally:
            action()
    except BaseException:
        action()
        raise


class HookScope(ABC):
    """A ``with`` block that attaches something, and takes it off again; once more if that is interrupted."""

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
    def _attach(self) -> None: ...

    @abstractmethod
    def _detach(self) -> None:
        """Undo what :meth:`_attach` did, all or a part of it, also if that is undone already."""


class WeakHook:
    """A method of an object as a hook, which does not keep the object alive.

    A copy of the model (deepcopy, pickle) gets one that does nothing, and not the object with it.
    """

    def __init__(self, owner: object, method: str = "", *first: Any):
        self._owner = None if owner is None else weakref.ref(owner)
        self._function, self._first = getattr(type(owner), method, None), first

    def __call__(self, *args: Any) -> Any:
        """The method's answer, if its owner is still there."""
        if self._owner is None or (owner := self._owner()) is None or self._function is None:
            return None
        return self._function(owner, *self._first, *args)

    def __reduce__(self) -> tuple[type[WeakHook], tuple[None]]:
        return (WeakHook, (None,))
