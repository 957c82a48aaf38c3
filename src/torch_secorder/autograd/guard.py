"""What must not happen while a graph is looked through: a start of a backward pass, a call of a module with the user's hooks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from torch_secorder.model.hooks import WeakHook, restoring

# The modules of torch through whose name of it every backward pass is started, and that name.
_STARTS = (torch.autograd, torch.autograd.graph)
_START = "_engine_run_backward"
_start: Callable[..., Any] = torch.autograd.graph._engine_run_backward

# Threads that look through a graph -> whether the node under way is somebody's Python function.
_looking: dict[int, bool] = {}
# Threads in which a checkpoint's forward may run again with the user's hooks.
_recomputing: set[int] = set()
_installing = threading.Lock()


class RunsOthersCodeError(Exception):
    """A node would run code of the user's, which is not to know that somebody looks through the graph."""


@contextmanager
def guarded() -> Iterator[None]:
    """Inside, in this thread, what would run code of the user's raises :class:`RunsOthersCodeError` instead.

    That is every start of a backward pass, every call of a module by a Python function, and every call of a module with hooks
    of the user's by whatever recomputes what a checkpoint threw away.
    """
    thread = get_ident()
    with _installing:
        if not _looking:
            for module in _STARTS:
                setattr(module, _START, _guarded_start)
        _looking[thread] = False
    handle = torch_module.register_module_forward_pre_hook(_refuse_call)
    try:
        yield
    finally:
        handle.remove()
        with _installing:
            del _looking[thread]
            if not _looking:
                for module in _STARTS:
                    setattr(module, _START, _start)


@contextmanager
def recomputation() -> Iterator[None]:
    """Inside, checkpoints run their forward again for a look also where that runs hooks of the user's on modules.

    This is for functions that are asked to differentiate the user's graph, which can't be done otherwise.
    """
    thread = get_ident()
    with restoring(partial(_recomputing.discard, thread)):
        _recomputing.add(thread)
        yield


@contextmanager
def in_python_function() -> Iterator[None]:
    """Inside, the node under way is somebody's Python function."""
    thread = get_ident()
    if thread not in _looking:
        yield
        return
    _looking[thread] = True
    try:
        yield
    finally:
        _looking[thread] = False


def _guarded_start(*args: Any, **kwargs: Any) -> Any:
    if get_ident() in _looking:
        raise RunsOthersCodeError("a node starts a backward pass of its own")
    return _start(*args, **kwargs)


def _refuse_call(module: nn.Module, args: object) -> None:
    thread = get_ident()
    calls_directly = _looking.get(thread)
    if calls_directly is None:
        return
    if calls_directly or (thread not in _recomputing and _has_foreign_hooks(module)):
        raise RunsOthersCodeError("a node calls a module")


def _has_foreign_hooks(module: nn.Module) -> bool:
    """Whether a call of a module would run hooks that are neither ours nor torch's."""
    tables: list[Mapping[int, Any]] = [module._forward_pre_hooks, module._forward_hooks]
    tables += [torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks]
    return any(_is_foreign(hook) for table in tables for hook in table.values())


def _is_foreign(hook: Any) -> bool:
    if isinstance(hook, WeakHook) or hook is _refuse_call:
        return False
    return not str(getattr(hook, "__module__", "")).startswith("torch.")
