"""What was changed for a while is put back, at whatever moment something interrupts: hooks on the user's model, for one."""

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


class WeakHook(partial[Any]):
    """A method of an object as a hook, which does not keep the object alive.

    The object removes its hooks when it goes, so that the method is never called without it. A copy of the model (deepcopy,
    pickle) gets a hook that does nothing, and not the object with it.
    """

    def __new__(cls, owner: object, method: str, *first: Any) -> Self:
        """The method as it is called with a proxy of its owner; no Python frame lies between torch and the method."""
        return super().__new__(cls, getattr(type(owner), method), weakref.proxy(owner), *first)

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        return (_Nothing, ())


class _Nothing:
    """What a copied model has in the place of a hook."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        pass
