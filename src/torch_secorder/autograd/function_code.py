"""Whether the code of a function shows that it writes to something which outlives the call."""

from __future__ import annotations

import builtins
import dis
from collections.abc import Iterator
from enum import Enum
from inspect import getattr_static, unwrap
from types import CodeType, FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch

_WRITES = ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_ATTR", "DELETE_ATTR")
_CONSTANTS = (bool, int, float, complex, str, bytes, Enum, ModuleType, property)
_SEEN_BY_OTHERS = (print, input, open, setattr, delattr, exec, eval, globals)

_found: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def writes_elsewhere(function_class: Any) -> bool:
    """Whether the backward of a :class:`torch.autograd.Function` may write to a global, a closure or an attribute.

    It does if its code, or that of a function that it calls by name, has an instruction for it, or names a list, a mapping, a
    tensor or another object that can be changed. What methods, modules and compiled code change can't be seen.
    """
    known = _found.get(function_class)
    if known is None:
        visited: set[Any] = set()
        known = any(_writes(getattr(function_class, name), visited) for name in ("backward", "vjp"))
        _found[function_class] = known
    return known


def _writes(function: Any, visited: set[Any]) -> bool:
    """Whether a function, or what it wraps or calls by name, may write to what is not its own."""
    inner = unwrap(function)
    if inner is not function and _writes(inner, visited):
        return True
    # A wrapper of torch's goes by the name and the module of what it wraps.
    if not isinstance(function, FunctionType) or str(function.__globals__.get("__name__")).startswith("torch."):
        return False
    if function in visited:
        return False
    visited.add(function)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return any(_is_write(one, function, cells, code, visited) for code, one in _instructions(function.__code__))


def _instructions(code: CodeType) -> Iterator[tuple[CodeType, dis.Instruction]]:
    """Those of a function and of the functions that it defines."""
    for one in dis.get_instructions(code):
        yield code, one
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _instructions(constant)


def _is_write(
    one: dis.Instruction, function: FunctionType, cells: dict[str, Any], code: CodeType, visited: set[Any]
) -> bool:
    if one.opname in _WRITES:
        return True
    name = one.argval
    if one.opname == "STORE_DEREF":
        return name in cells
    if one.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
        value = function.__globals__.get(name, getattr(builtins, str(name), None))
    elif one.opname in ("LOAD_DEREF", "LOAD_CLASSDEREF") and name in cells:
        try:
            value = cells[name].cell_contents
        except ValueError:  # The cell is empty.
            return False
    else:
        return False
    return _may_change(value, code, visited)


def _may_change(value: Any, code: CodeType, visited: set[Any]) -> bool:
    """Whether code that names a value may change something by it."""
    if value is None or isinstance(value, _CONSTANTS):
        return False
    if isinstance(value, (tuple, frozenset)):
        return any(_may_change(one, code, visited) for one in value)
    if isinstance(value, FunctionType):
        return _writes(value, visited)
    if isinstance(value, type):
        if value.__module__.partition(".")[0] in ("builtins", "torch"):
            return False
        attributes = (getattr_static(value, name, None) for name in code.co_names)
        return any(not isinstance(one, type) and _may_change(_unbound(one), code, visited) for one in attributes)
    if callable(value):
        return any(value is one for one in _SEEN_BY_OTHERS)
    return not isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format))


def _unbound(attribute: Any) -> Any:
    """The function of a static method or a class method; any other attribute as it is."""
    return getattr(attribute, "__func__", attribute)
