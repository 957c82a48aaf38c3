"""How often tensors were changed in place, which torch counts to notice that a saved one is not what it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

# How often a tensor, or one that it shares its memory with by a view, was changed in place. (This is read for each tensor of
# each step; a Python function would double what that costs.)
version: Callable[[Tensor], int] = attrgetter("_version")


def versions(values: Iterable[Any]) -> tuple[int, ...]:
    """The same for each tensor among these values that counts."""
    return tuple([x._version for x in values if isinstance(x, Tensor) and not x.is_inference()])


def hiding_changes(model: nn.Module) -> AbstractContextManager[object]:
    """Version counters stay as they are inside: buffers are restored, so that an earlier graph may still be differentiated."""
    return _unsafe_preserve_version_counter((*model.parameters(), *model.buffers()))
