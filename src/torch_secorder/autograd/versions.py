"""How often tensors were changed in place, which torch counts to notice that a saved one is not what it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any
from weakref import ref

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


@dataclass(frozen=True, eq=False)
class SameTensor:
    """A tensor as it is now; equal to the same one later, as long as it lives and nobody has changed it in place.

    A view is as good as the tensor that it is a view of, since a model may make the view anew in every step. Changes through
    ``.data`` go unseen, as torch itself does not see them.

    Attributes:
        owner: the tensor, or that of which it is a view; None once it is gone.
        seen: what of the owner it shows, and how often that was changed.
    """

    owner: ref[Tensor]
    seen: tuple[object, ...]

    @classmethod
    def of(cls, x: Tensor) -> SameTensor:
        """A tensor that counts its changes, as it is now."""
        owner = x if x._base is None else x._base
        return cls(ref(owner), (x.data_ptr(), tuple(x.shape), x.stride(), x.dtype, version(x)))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, SameTensor)
            and self.owner() is not None
            and self.owner() is other.owner()
            and self.seen == other.seen
        )

    def __hash__(self) -> int:
        return hash(self.seen)
