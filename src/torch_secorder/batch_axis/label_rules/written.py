"""Labels through writes into a part of a tensor, whose node shows neither the part nor what was written.

The node is called by itself, with numbers of ours. What it does with these is compared, on its device, with what it has to do for
the rule to apply. If it does anything else, the rule does not apply.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import Node

from torch_secorder.autograd.graph_pass import calling_nodes
from torch_secorder.autograd.nodes import node_vjp, outputs_of
from torch_secorder.batch_axis.label_rules.asked import random_numbers
from torch_secorder.batch_axis.label_rules.registry import COPY_SLICES, Answer, At, rule
from torch_secorder.batch_axis.label_rules.strided import addresses
from torch_secorder.batch_axis.labels import Labels, differ_along, joined_along, on_axis, reshaped

# By how many roundings the answer for a number of ours may differ from that number times the answer for one.
ROUNDINGS = 8


def _of_slices(node: Any) -> list[Tensor] | None:
    """What a write into a part does: three flags, the part's shape, numbers of entries, and which indices of each axis it has.

    The first flag says that what was there before gets its own gradient or none. The second says that what was written gets the
    gradient of the entries with these indices as it is, in order. The third says that it gets that of the
    entries whose numbers, in the order of the whole, begin with the first of the numbers and grow along each of the part's axes
    by another one, as those of a view do. Without a second input there is the first flag only.
    """
    whole = outputs_of(node)[0]
    shape = tuple(whole.shape)
    if not whole.dtype.is_floating_point or whole.is_nested_tensor or not math.prod(shape):
        return None
    given = random_numbers(whole)
    before, *written = node_vjp(node, [given])
    keeps = given.new_ones((), dtype=torch.bool) if before is None else ((before == given) | (before == 0)).all()
    if not written or written[0] is None or not written[0].numel():
        return [keeps[None]]
    part = written[0].flatten()
    places, are_places = _places(node, whole, len(part))
    are_places &= (given.flatten()[places] == part).all()
    taken = places.new_zeros(sum(shape))
    for axis, size in enumerate(shape):
        taken.index_fill_(0, places // math.prod(shape[axis + 1 :]) % size + sum(shape[:axis]), 1)
    sizes = torch.tensor(written[0].shape, dtype=torch.int64, device="cpu")
    numbers, is_view = _as_of_a_view(places.view(written[0].shape))
    count = torch.stack([own.sum() for own in taken.split(shape)]).prod()
    are_all = (places.diff() > 0).all() & (count == len(part))
    return [torch.stack([keeps, are_places & are_all, are_places & is_view]), sizes, numbers, *taken.split(shape)]


def _as_of_a_view(places: Tensor) -> tuple[Tensor, Tensor]:
    """The first of some places, and by how much they grow along each axis; and whether these numbers give them all."""
    first = places[(0,) * places.dim()]
    steps = [
        places[tuple([int(other == axis) for other in range(places.dim())])] - first
        if size > 1
        else first.new_zeros(())
        for axis, size in enumerate(places.shape)
    ]
    return torch.stack([first, *steps]), (places == first + addresses(places.shape, steps, places.device)).all()


def _places(node: Node, whole: Any, count: int) -> tuple[Tensor, Tensor]:
    """Where the entries of a part come from, if they were taken as they are: the numbers of entries of the whole.

    They come in digits that the dtype holds, one call for each.

    Returns:
        the numbers, and whether they are some.
    """
    numel, base, unit = math.prod(whole.shape), round(2 / torch.finfo(whole.dtype).eps), 1
    number = torch.arange(numel, device=whole.device)
    found, are_digits = number.new_zeros(count), number.new_ones((), dtype=torch.bool)
    while unit < numel:
        digits = number if numel <= base else number // unit % base
        digit = node_vjp(node, [digits.to(whole.dtype).view(tuple(whole.shape))])[1]
        assert digit is not None
        own = digit.flatten().long()
        found, unit, are_digits = found + own * unit, unit * base, are_digits & (own == digit.flatten()).all()
    places = found.clamp(0, numel - 1)
    return places, are_digits & (places == found).all()


@rule(COPY_SLICES, asks=_of_slices)
def _copy_slices(at: At) -> Answer | None:
    """A write into a part of a tensor: what was there before and what was written, maybe by an operation with both."""
    if not at.indices:
        return None
    flags, *more = at.indices
    assert flags is not None
    answer: list[Labels | None] = [None] * len(at.inputs)
    answer[0] = at.first if flags[0] else None
    sizes, numbers, *taken = [one.numpy() for one in more if one is not None] or [np.zeros(0), np.zeros(0)]
    if len(flags) > 1 and flags[1]:
        found = at.first
        for axis, one in enumerate(taken):
            found = found.compress(one, axis) if found.shape[axis] != 1 else found
        answer[1] = reshaped(found, [int(one.sum()) for one in taken], sizes.tolist())
    elif len(flags) > 1 and flags[0] and flags[2]:
        first, *steps = numbers.tolist()
        places = first + addresses(sizes.tolist(), steps, torch.device("cpu")).numpy()
        answer[1] = np.broadcast_to(at.first, at.shapes[0]).reshape(-1)[places]
    elif not all(flags[:2]) and (samples := axis_of_samples(at.first)) is not None:
        answer = _as_it_stays(at, samples) or answer
    return answer


def takes_some(at: At, axis: int) -> bool:
    """Whether the part that was written is known, and has not all indices along this axis."""
    flags, *more = at.indices
    taken = more[2 + axis : 3 + axis]
    if not taken or flags is None or taken[0] is None:
        return False
    return bool(flags[:2].all()) and not bool(taken[0].all())


def is_known_view(at: At, axis: int | None) -> bool:
    """Whether the part that was written is known as a view in which what lies along this axis is not on the same axis in order.

    A part that has only some of the samples is left out, since a router writes others in each step.
    """
    flags, sizes = (*at.indices[:2], None)[:2] if at.indices else (None, None)
    if flags is None or sizes is None or not flags[0] or not flags[2]:
        return False
    if axis is None or takes_some(at, axis):
        return False
    if not flags[1]:
        return True
    return sizes.tolist()[axis : axis + 1] != [at.shapes[0][axis]] or (axis > 0 and len(sizes) != len(at.shapes[0]))


def axis_of_samples(labels: Labels) -> int | None:
    """The only axis along which labels tell several samples apart; None if there are more, or none."""
    found = [axis for axis in range(labels.ndim) if differ_along(labels, [axis])]
    return found[0] if len(found) == 1 else None


def _as_it_stays(at: At, axis: int) -> list[Labels | None] | None:
    """The labels where each input keeps the samples on this axis, whatever else is done to the numbers."""
    near = torch.empty(0, device=outputs_of(at.node)[0].device)
    with calling_nodes([near]), torch.no_grad():
        stays = keeps_order(at.node, axis)
    if stays is None or not bool(stays):
        return None
    rows = joined_along(at.first, [other for other in range(at.first.ndim) if other != axis]).reshape(-1)
    return [None if shape is None else on_axis(rows, axis, len(shape)) for shape in at.inputs]


def keeps_order(node: Any, axis: int) -> Tensor | None:
    """Whether a write into a part keeps what lies along an axis in order, there before and written; None if nothing tells.

    The node is called with ones, and with another number for each index along the axis. It is linear, so that the second answer
    is the first one times these numbers if, and only if, each index gets what is its own.
    """
    whole = outputs_of(node)[0]
    shape = tuple(whole.shape)
    if not whole.dtype.is_floating_point or whole.is_nested_tensor or not math.prod(shape):
        return None
    forgiven = ROUNDINGS * torch.finfo(whole.dtype).eps
    if 2 * forgiven * shape[axis] >= 1:
        return None  # No numbers are far enough apart.
    own = _shuffled(shape[axis], whole.device, whole.dtype)
    ones = node_vjp(node, [own.new_ones(()).expand(shape)])
    numbered = node_vjp(node, [_on_axis(own, axis, len(shape)).expand(shape)])
    keeps = own.new_ones((), dtype=torch.bool)
    for number, (one, other) in enumerate(zip(ones, numbered, strict=True)):
        if one is None or other is None:
            continue
        if one.shape[axis : axis + 1] != own.shape or (number and axis and one.dim() != len(shape)):
            return None
        expected = one * _on_axis(own, axis, one.dim())
        if expected.is_cpu and torch.equal(other, expected):  # as most writes have it, which takes no wait there
            continue
        keeps = keeps & ((other - expected).abs() <= forgiven * expected.abs()).all()
    return keeps


def _on_axis(numbers: Tensor, axis: int, dims: int) -> Tensor:
    return numbers.view([-1 if other == axis else 1 for other in range(dims)])


@lru_cache(64)  # The host would wait for a copy to a device in each step.
def _shuffled(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Whole numbers from one, each once, in any order, so that no mean of neighbors is one of them at all places."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randperm(size, generator=generator, device="cpu") + 1).to(device, dtype)
