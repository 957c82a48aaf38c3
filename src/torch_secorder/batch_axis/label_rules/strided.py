"""Labels through views of memory, which are made from sizes and strides and do not show what they are a view of.

An entry of such a view lies at an address that its sizes and strides give. The addresses of what it is a view of are not kept,
but the node tells them if it is called by itself, with addresses for gradients.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_secorder.autograd.nodes import node_vjp, outputs_of
from torch_secorder.autograd.saved import saved
from torch_secorder.batch_axis.label_rules.asked import LARGEST_QUESTION
from torch_secorder.batch_axis.label_rules.registry import Answer, At, rule
from torch_secorder.batch_axis.labels import NOBODY, scattered

AS_STRIDED = ("AsStridedBackward0", "AsStridedBackward1")


def addresses_behind(node: Any) -> list[Tensor] | None:
    """Where in memory a view's input lies: one tensor with a flag, the address of its first entry, and a stride for each axis.

    The flag says that the other numbers are right for every entry that the view shows. Addresses count from the view's own first
    entry. An entry of the input gets the gradients of all places in the view that show it, which have its address in common: the
    sum of their addresses over their number tells it. Addresses go in as digits, so that the dtype holds such sums exactly. The
    result is None for a view that cannot be asked.
    """
    whole = outputs_of(node)[0]
    if not whole.dtype.is_floating_point or whole.is_nested_tensor or not math.prod(whole.shape):
        return None
    size, stride = saved(node, "size"), saved(node, "stride")
    base = 2 ** (round(math.log2(2 / torch.finfo(whole.dtype).eps)) // 2)
    powers = (base**place for place in itertools.count())
    units = [1, *itertools.takewhile(lambda unit: unit < _extent(size, stride), itertools.islice(powers, 1, None))]
    if (1 + len(units)) * math.prod(size) > LARGEST_QUESTION:
        return None
    given = addresses(size, stride, whole.device)
    counts = node_vjp(node, [torch.ones(size, dtype=whole.dtype, device=whole.device)])[0]
    if counts is None:
        return None
    shown = counts != 0
    exact, address = counts.max() <= base, torch.zeros_like(counts, dtype=torch.int64)
    for unit in units:
        answer = node_vjp(node, [(given // unit % base).to(whole.dtype)])[0]
        assert answer is not None
        digit = (answer / counts.where(shown, 1)).round()
        # A repeated entry gets a part of its sum.
        exact = exact & ((digit * counts - answer).abs() <= counts / 4).all()
        address += digit.long() * unit
    strides = [_step(address, shown, axis) for axis in range(address.dim())]
    there = addresses(address.shape, strides, address.device)
    first = (address - there).where(shown, torch.iinfo(torch.int64).min).amax()
    exact = exact & ((address == first + there) | ~shown).all()
    return [torch.stack([exact, first, *strides])]


def _extent(size: Sequence[int], stride: Sequence[int]) -> int:
    """How many addresses there are from the first entry of a view to its last one."""
    return 1 + sum((count - 1) * step for count, step in zip(size, stride, strict=True))


def addresses(size: Sequence[int], stride: Sequence[int | Tensor], device: torch.device) -> Tensor:
    """The address of each entry of a tensor, counted from its first one."""
    found = torch.zeros((), dtype=torch.int64, device=device)
    for axis, (count, step) in enumerate(zip(size, stride, strict=True)):
        column = torch.arange(count, device=device) * step
        found = found + column.view([-1 if other == axis else 1 for other in range(len(size))])
    return found


def _step(address: Tensor, shown: Tensor, axis: int) -> Tensor:
    """By how much addresses grow along an axis, as each entry that has one and the one before it that has one show it."""
    if address.shape[axis] < 2:
        return address.new_zeros(())
    column = torch.arange(address.shape[axis], device=address.device)
    number = column.view([-1 if other == axis else 1 for other in range(address.dim())]).expand_as(address)
    before, number_before = (
        x.where(shown, -1).cummax(axis).values.narrow(axis, 0, len(column) - 1) for x in (address, number)
    )
    address, number, shown = (x.narrow(axis, 1, len(column) - 1) for x in (address, number, shown))
    return ((address - before) // (number - number_before)).where(shown & (number_before >= 0), 0).amax()


@rule(*AS_STRIDED, reads=("size", "stride"), asks=addresses_behind)
def _view_of_memory(at: At) -> Answer | None:
    """Every entry of the input gets the labels of the places in the view that have its address."""
    shape = at.inputs[0]
    if not at.indices or shape is None:
        return None
    (told,) = at.indices
    assert told is not None
    is_known, first, *strides = (int(number) for number in told)
    if not is_known:
        return None
    cpu, size, stride = torch.device("cpu"), saved(at.node, "size"), saved(at.node, "stride")
    own = addresses(size, stride, cpu).numpy()
    extent = _extent(size, stride)
    labels = scattered(np.broadcast_to(at.first, at.shapes[0]).reshape(-1), 0, own.reshape(-1), (extent,))
    there = first + addresses(shape, strides, cpu).numpy()
    return [np.where((there >= 0) & (there < extent), labels[there.clip(0, extent - 1)], NOBODY)]
