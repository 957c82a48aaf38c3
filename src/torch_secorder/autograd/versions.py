"""How often tensors were changed in place, which torch counts to notice that a saved one is not what it was."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter


def version(x: Tensor) -> int:
    """How often a tensor, or one that it shares its memory with by a view, was changed in place."""
    return x._version


def versions(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """The same for each tensor among a call's arguments, but for those that count nothing."""
    found = (*args, *kwargs.values()) if kwargs else args
    return tuple([x._version for x in found if isinstance(x, Tensor) and not x.is_inference()])


def hiding_changes(model: nn.Module) -> AbstractContextManager[object]:
    """Version counters stay as they are inside: buffers are restored, so that an earlier graph may still be differentiated."""
    return _unsafe_preserve_version_counter((*model.parameters(), *model.buffers()))
