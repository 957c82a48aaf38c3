"""Leaving the user's model as it was: buffers, modes and flags are put back, whatever happens inside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from torch_secorder.model.hooks import restoring

_turns: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()


def lock_of(model: nn.Module) -> RLock:
    """The lock that serializes temporary changes to a model, such as ``requires_grad`` flags, with the code that reads them."""
    return _turns.setdefault(model, RLock())


def restorer_of_buffers(model: nn.Module) -> Callable[[], None]:
    """A function that gives buffers, and tables that ``max_norm`` rewrites, the values again that they have now."""
    modules = list(model.modules())
    kept: list[tuple[Any, str, Tensor]] = [
        (m._buffers, name, b) for m in modules for name, b in m._buffers.items() if b is not None
    ]
    for m in modules:
        if vars(m).get("max_norm", getattr(type(m), "max_norm", None)) is not None:
            kept += [(m._parameters, name, p) for name, p in m._parameters.items() if p is not None]
    before = [(owner, name, value, value.detach().clone()) for owner, name, value in kept]

    @torch.no_grad()
    def restore() -> None:
        for owner, name, tensor, value in before:
            # A buffer that was not changed is not written to, since an earlier graph may have saved it for its backward.
            if not torch.equal(tensor, value):
                tensor.copy_(value)
            owner[name] = tensor

    return restore


@contextmanager
def restoring_buffers(model: nn.Module) -> Iterator[None]:
    """A block after which buffers, and tables that ``max_norm`` rewrites, have the values again that a forward changed."""
    with restoring(restorer_of_buffers(model)):
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """A block in which the model is in eval mode, and after which each module is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]

    def restore() -> None:
        for module, mode in modes:
            module.training = mode

    with restoring(restore):
        model.eval()
        yield


@contextmanager
def requiring_grad(parameters: Iterable[Tensor], others: Iterable[Tensor] = ()) -> Iterator[None]:
    """A block in which these parameters require a gradient and the others do not; afterwards the flags are as before."""
    frozen = [p for p in parameters if not p.requires_grad]
    trained = [p for p in others if p.requires_grad]

    def require(wanted: bool) -> None:
        for p in frozen:
            p.requires_grad_(wanted)
        for p in trained:
            p.requires_grad_(not wanted)

    with restoring(partial(require, False)):
        require(True)
        yield
