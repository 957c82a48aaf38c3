"""What functions of Python's keep for their backward, which may decide where they put samples.

A function may keep plain values, lists, mappings and simple objects, and tensors that it did not save. A look calls it with
copies of all that can be changed.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_secorder.autograd.function_code import writes_elsewhere
from torch_secorder.autograd.nodes import (
    PLAIN,
    has_packed_tensors,
    is_constant,
    is_others_function,
    node_vjp,
    tensors_of_weights,
)
from torch_secorder.autograd.self_test import raw_tensors

# How deep in each other values may be, so that one that holds itself is no endless one, and how many are looked at.
DEEPEST, MOST = 8, 1000

_COUNTER = itertools.count()


class Kept(NamedTuple):
    """One value that a function keeps.

    Attributes:
        name: its attribute's name and the way from there.
        value: the value.
        is_known: whether it is plain, a list of plain values, or a tensor; nobody knows how others change.
    """

    name: str
    value: Any
    is_known: bool


class Unseen:
    """What stands for tensors that must not be looked at, so that nobody knows whether those of two steps are the same."""

    def __str__(self) -> str:
        return f"unseen tensors {next(_COUNTER)}"


def kept_values(functions: Iterable[Any], n: int | None) -> Hashable:
    """What nodes of Python functions keep, equal where it is the same; a matrix of samples is never the same.

    Left out is what :func:`numbers_of_function` has.

    Args:
        functions: the nodes, in an order that is the same for graphs of one kind.
        n: how many samples there are, if that is known.
    """
    if n is None or n < 2:
        return ()
    return tuple([tuple(_told_by(one, n) for one in _kept_by(node)) for node in functions])


def numbers_of_function(node: Any, n: int) -> dict[str, Any]:
    """The integers and masks that a function of Python's keeps, as many of them together as could tell n samples apart.

    Tensors that must not be looked at may be such numbers.
    """
    return {one.name: one.value for one in _kept_by(node) if _are_numbers(one.value, n)}


def hides_state(node: Any) -> bool:
    """Whether a function that does not come with torch writes elsewhere, or keeps what no copy can be made of."""
    if not is_others_function(node):
        return False
    if writes_elsewhere(node._forward_cls) or tensors_of_weights(node):
        return True
    return not all(one.is_known for name, value in vars(node).items() for one in _parts(name, value))


def vjp_in_look(node: Any, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of a node's inputs, given those of its outputs. A function is called with copies of what it could change."""
    kept = dict(vars(node)) if is_others_function(node) else {}
    changeable = {name: value for name, value in kept.items() if not (value is None or isinstance(value, PLAIN))}
    if not changeable or hides_state(node):
        return node_vjp(node, grads)
    tensors = [one.value for name, value in changeable.items() for one in _parts(name, value)]
    vars(node).update(deepcopy(changeable, {id(x): x.clone() for x in tensors if isinstance(x, Tensor)}))
    try:
        return node_vjp(node, grads)
    finally:
        vars(node).clear()
        vars(node).update(kept)


def _kept_by(node: Any) -> Iterator[Kept]:
    """What a function keeps.

    What hooks keep elsewhere is not looked at, since a checkpoint would run its forward again for it; where torch does not show
    whether hooks do, no saved tensor is. Nor is what a re-entrant checkpoint keeps, the arguments of a function that may do
    anything with them.
    """
    if node.name() == "CheckpointFunctionBackward":
        return
    for name, value in vars(node).items():
        yield from _parts(name, value)
    packed = has_packed_tensors(node)
    if packed is None and raw_tensors(node):
        yield Kept("saved tensors", Unseen(), is_known=False)
    elif packed is False:
        try:
            saved = node.saved_tensors
        except RuntimeError:  # One of them was changed in place, which a backward pass would refuse, too.
            return
        for place, x in enumerate(saved):
            if x is not None:
                yield Kept(f"saved tensor {place}", x, is_known=True)


def _parts(name: str, value: Any) -> Iterator[Kept]:
    """The values in a value; of too many the first ones, and one that is not known."""
    found = _all_parts(name, value, 0)
    yield from itertools.islice(found, MOST)
    yield from itertools.islice((Kept(name, None, is_known=False) for _ in found), 1)


def _all_parts(name: str, value: Any, depth: int) -> Iterator[Kept]:
    if is_constant(value):
        yield Kept(name, value, is_known=True)
    elif isinstance(value, Tensor):
        yield Kept(name, value, is_known=type(value) is Tensor)
    elif depth < DEEPEST and (inner := _inside(value)) is not None:
        yield Kept(name, type(value).__qualname__, is_known=True)
        for key, one in inner:
            yield from _all_parts(f"{name}.{key}", one, depth + 1)
    else:
        yield Kept(name, value, is_known=False)


def _inside(value: Any) -> Iterable[tuple[object, Any]] | None:
    """The values in a list, a mapping or a simple object, each with its name; None for anything else."""
    if isinstance(value, (list, tuple)):
        return enumerate(value)
    if type(value) is dict:
        return value.items()
    plain = not (callable(value) or isinstance(value, (nn.Module, type)) or hasattr(type(value), "__deepcopy__"))
    known = type(value).__module__.partition(".")[0] not in ("builtins", "torch")
    return vars(value).items() if plain and known and hasattr(value, "__dict__") and not _has_slots(value) else None


def _has_slots(value: Any) -> bool:
    return any("__slots__" in vars(kind) for kind in type(value).__mro__)


def _are_numbers(value: Any, n: int) -> bool:
    if isinstance(value, Unseen):
        return True
    if isinstance(value, Tensor):
        return value.numel() >= n and not (value.is_floating_point() or value.is_complex())
    return _is_list_of_integers(value, n)


def _is_list_of_integers(value: Any, n: int) -> bool:
    listed = isinstance(value, (list, tuple)) and not isinstance(value, torch.Size)
    return listed and len(value) >= n and all(isinstance(one, int) for one in value)


def _told_by(kept: Kept, n: int) -> Hashable:
    """What tells values of one name apart, as far as a value decides where samples are and no other function looks at it."""
    value = kept.value
    if _are_numbers(value, n):
        return kept.name
    if not isinstance(value, Tensor):
        # Text tells apart what is equal or has an equal hash, such as 1 and True, or -1 and -2.
        return kept.name, repr(value) if kept.is_known else str(type(value))
    if type(value) is not Tensor or value.requires_grad:
        return kept.name
    if value.numel() < n:
        return kept.name, str(value.tolist()) if value.device.type == "cpu" else None
    return kept.name, next(_COUNTER) if list(value.shape).count(n) > 1 else None
