"""Calls of the user's loss that leave what it is given, and what it keeps in buffers, as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from inspect import isfunction, ismethod
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from torch_secorder.autograd.versions import versions
from torch_secorder.model.containers import copied, mapped, tensors


def loss_value(loss_fn: Callable[[Any, Any], Any], outputs: Any, targets: Any) -> Any:
    """What a loss function returns, which finds the same numbers in its buffers and in its targets at each call.

    A loss with a moving center or counts of classes would be another function at each of the calls that find out how it combines
    samples, and the user's training would go on with what these calls have left there. So would one that changes its targets in
    place (``targets[targets == 255] = -100``), and one that changes its outputs so (``outputs /= 2``) takes no leaves.
    """
    with on_copies_of_buffers(loss_fn):
        return loss_fn(mapped(_no_leaf, outputs), copied(targets))


class OutputsChangedError(Exception):
    """A loss has changed the outputs in place, so that no other call can be given them."""


@contextmanager
def unchanged(outputs: Any) -> Iterator[None]:
    """A block in which a loss gets these outputs.

    Raises:
        OutputsChangedError: if it has changed them in place.
    """
    before = versions(tensors(outputs))
    yield
    if versions(tensors(outputs)) != before:
        raise OutputsChangedError


def with_copies_of_outputs(loss_fn: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The same loss, which gets copies of the outputs that it is given."""
    return partial(_of_copies, loss_fn)


def _of_copies(loss_fn: Callable[[Any, Any], Any], outputs: Any, targets: Any) -> Any:
    return loss_fn(mapped(Tensor.clone, outputs), targets)


def _no_leaf(x: Tensor) -> Tensor:
    """The tensor, or a copy of a leaf that requires a gradient, which can't be changed in place."""
    return x.clone() if x.is_leaf and x.requires_grad else x


@contextmanager
def on_copies_of_buffers(loss_fn: Any) -> Iterator[None]:
    """A block in which the modules that a loss function holds have copies of their buffers, which it may change.

    The graph of a loss may have saved such a buffer, so that putting numbers back in place would spoil its backward pass.
    """
    tables = {id(m._buffers): m._buffers for held in _modules(loss_fn) for m in held.modules() if _may_change(m)}
    before = [
        (table, {name: b for name, b in table.items() if b is not None and not b.requires_grad})
        for table in tables.values()
    ]
    copies = {buffer: buffer.clone() for _, own in before for buffer in own.values()}
    try:
        for table, own in before:
            table.update({name: copies[buffer] for name, buffer in own.items()})
        yield
    finally:
        for table, own in before:
            table.update(own)


def _may_change(module: nn.Module) -> bool:
    """Whether a module may write to buffers of its own; torch's losses only read the weights of their classes."""
    own = isinstance(module._buffers, dict) and bool(module._buffers)  # A scripted module has them elsewhere.
    return own and type(module).__module__ != nn.modules.loss.__name__


def _modules(loss_fn: Any) -> list[nn.Module]:
    """The modules that a loss function holds: itself, as arguments, in its closure, as globals or as what its method is of."""
    if isinstance(loss_fn, nn.Module):
        return [loss_fn]
    if isinstance(loss_fn, partial):
        return [m for held in (loss_fn.func, *loss_fn.args, *loss_fn.keywords.values()) for m in _modules(held)]
    if ismethod(loss_fn):
        return [*_modules(loss_fn.__self__), *_modules(loss_fn.__func__)]
    return [one for one in _named_in(loss_fn) if isinstance(one, nn.Module)] if isfunction(loss_fn) else []


def _named_in(function: FunctionType) -> Iterator[Any]:
    """What a function finds in its closure and among the globals that it names, as far as that is there yet."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # an empty cell: a variable of the function around it that is set later
            yield cell.cell_contents
    names = function.__globals__
    yield from (names[name] for name in function.__code__.co_names if name in names)
