"""Temporary changes to the user's model, undone even when KeyboardInterrupt arrives half-way."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

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


class WeakHook(partial[Any]):
    """A method of an object as a hook that does not keep the object alive.

    The object removes its hooks when it goes, so that the method is never called without it. A copy of the model (deepcopy,
    pickle) has a hook that does nothing in its place, so that the object is not copied along.
    """

    def __new__(cls, owner: object, method: str, *first: Any) -> Self:
        """The method bound to a proxy of its owner, which torch calls without another Python frame in between."""
        return super().__new__(cls, getattr(type(owner), method), weakref.proxy(owner), *first)

    def disarm(self) -> None:
        """Do nothing from now on: another thread may be about to call the hook, though it was removed meanwhile."""
        self.__setstate__((_Nothing(), (), {}, None))  # type: ignore[attr-defined]  # of partial objects

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        return (_Nothing, ())


class _Nothing:
    """What a copied model has in the place of a hook."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        pass
