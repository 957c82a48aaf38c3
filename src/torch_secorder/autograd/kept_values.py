"""The values that functions of Python's keep for their backward besides large tensors, which may decide where they put samples."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Iterator
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from torch_secorder.autograd.nodes import has_packed_tensors, is_list_of_integers, is_python_function

_COUNTER = itertools.count()
_PLAIN = (bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device, torch.layout, torch.memory_format)


def kept_values(nodes: Iterable[Any], n: int | None) -> Hashable:
    """What the functions of Python's among some nodes keep, equal where it is the same; a matrix of samples is never the same.

    Left out are lists of integers, and saved integers and masks, of which there are enough to tell ``n`` samples apart, since
    ``numbers_of_function`` has those, and the arguments of functions that re-entrant checkpoints call.

    Args:
        nodes: the nodes, in an order that is the same for graphs of one kind.
        n: how many samples there are, if that is known.
    """
    if n is None or n < 2:
        return ()
    functions = [node for node in nodes if is_python_function(node) and node.name() != "CheckpointFunctionBackward"]
    return tuple([tuple(_kept_by(node, n)) for node in functions])


def _kept_by(node: Any, n: int) -> Iterator[Hashable]:
    for name, value in vars(node).items():
        if not is_list_of_integers(value, n):
            yield name, _text(value)
    if has_packed_tensors(node) is False:
        try:
            kept = node.saved_tensors
        except RuntimeError:  # One of them was changed in place, which a backward pass would refuse, too.
            return
        for place, x in enumerate(kept):
            if type(x) is Tensor and not x.requires_grad and (told := _told_by(x, n)) is not None:
                yield place, told


def _text(value: Any) -> str:
    """A text that tells apart plain values, also where these are equal or have the same hash, as 1 and True, or -1 and -2.

    Of anything else it names the type.
    """
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__}({', '.join(map(_text, value))})"
    return repr(value) if value is None or isinstance(value, _PLAIN) else str(type(value))


def _told_by(x: Tensor, n: int) -> Hashable | None:
    """The numbers of a tensor that is too small to hold data of each sample; what no other has for a matrix of samples."""
    if x.numel() < n:
        return str(x.tolist()) if x.device.type == "cpu" else None
    return next(_COUNTER) if x.is_floating_point() and list(x.shape).count(n) > 1 else None
