"""Indices that are out of range are found by the host, before a device is asked.

A CPU raises an IndexError. A GPU ends all of the process's work there: whatever is asked of it from then on raises. Where the
library calls a model or a loss on some samples of a batch, the index of another one, as among the edges of a graph, is out of
range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WHOLE_NUMBERS = (torch.int64, torch.int32)


class Range(NamedTuple):
    """An index, and the number of entries that it picks from; a negative one may count from the end."""

    index: Any
    size: int
    from_end: bool = False


def checked_on_host(tensors: Iterable[Tensor]) -> AbstractContextManager[object]:
    """A block in which an index out of range raises an IndexError on these tensors' devices, too; the host waits for each."""
    return nullcontext() if all(x.device.type == "cpu" for x in tensors) else _Checked()  # type: ignore[no-untyped-call]  # torch does not type it.


class _Checked(TorchDispatchMode):
    """The mode that looks at indices before they are used."""

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        ranges = _RANGES.get(operation.overloadpacket._qualified_op_name.removeprefix("aten::"))
        for index, size, from_end in ranges(args) if ranges is not None else ():
            if isinstance(index, Tensor) and index.dtype in WHOLE_NUMBERS and index.numel():
                plain = index.values() if index.is_nested else index
                lowest, highest = torch.stack(plain.aminmax()).tolist()
                if highest >= size or lowest < (-size if from_end else 0):
                    raise IndexError(
                        f"index {highest if highest >= size else lowest} is out of range for {size} entries"
                    )
        return operation(*args, **(kwargs or {}))


def _of_tensors(args: Sequence[Any]) -> Iterator[Range]:
    """``x[indices]``: one index for each axis, or none."""
    axis = 0
    for index in args[1]:
        if index is not None and index.dtype in WHOLE_NUMBERS:
            yield Range(index, args[0].shape[axis], from_end=True)
        axis += index.dim() if index is not None and index.dtype in (torch.bool, torch.uint8) else 1


def _along_axis(args: Sequence[Any]) -> Iterator[Range]:
    """An operation of ``(x, axis, index, ...)``."""
    x, axis, index = args[:3]
    yield Range(index, x.shape[axis] if x.dim() else 1)


def _of_entries(args: Sequence[Any]) -> Iterator[Range]:
    yield Range(args[1], args[0].numel(), from_end=True)


def _of_rows(args: Sequence[Any]) -> Iterator[Range]:
    yield Range(args[1], len(args[0]))


_ALONG = (
    "gather index_select scatter scatter_ scatter_add scatter_add_ scatter_reduce scatter_reduce_ index_add index_add_ "
)
_ALONG += "index_copy index_copy_ index_fill index_fill_ index_reduce index_reduce_"
_RANGES: dict[str, Callable[[Sequence[Any]], Iterator[Range]]] = {
    **dict.fromkeys(("index", "index_put", "index_put_", "_index_put_impl_"), _of_tensors),
    **dict.fromkeys(_ALONG.split(), _along_axis),
    **dict.fromkeys(("take", "put", "put_"), _of_entries),
    **dict.fromkeys(("embedding", "_embedding_bag", "_embedding_bag_forward_only"), _of_rows),
}
