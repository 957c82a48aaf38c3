"""Orders of samples: found in one graph, and compared with those of later graphs of its kind."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from torch_secorder.autograd.double_precision import together_on_host
from torch_secorder.autograd.graph_pass import calling_nodes
from torch_secorder.autograd.kept_values import numbers_of_function
from torch_secorder.autograd.nodes import any_may_be_packed, is_python_function, may_have_packed_tensors, output_shapes
from torch_secorder.autograd.saved import axes_of_each, knows, saved, settings
from torch_secorder.autograd.versions import SameTensor
from torch_secorder.batch_axis.derivation import Derivation
from torch_secorder.batch_axis.label_rules import COPY_SLICES, MASKED_SCATTER
from torch_secorder.batch_axis.label_rules.asked import mark_of
from torch_secorder.batch_axis.label_rules.strided import AS_STRIDED
from torch_secorder.batch_axis.label_rules.written import keeps_order
from torch_secorder.batch_axis.moving import Mover
from torch_secorder.batch_axis.order import Order
from torch_secorder.graph.walk import Walk

# How many entries an index may have to be compared with that of the graph before.
LARGEST_INDEX = 2**20
# The kinds of nodes that are called by themselves in each step, since what they show is not all that decides what they do.
ASKED = frozenset([COPY_SLICES, MASKED_SCATTER, *AS_STRIDED])


def order_of(walk: Walk, derivation: Derivation, *, as_shapes_say: bool) -> Order:
    """What decides where the samples are in graphs of one kind, of which one was derived."""
    numbers = {node: number for number, node in enumerate(walk.nodes)}
    found = [(numbers.get(one.node), one.places) for one in derivation.movers]
    compared = frozenset([(number, places) for number, places in found if number is not None])
    return Order(compared if len(compared) == len(found) else None, derivation.tells, as_shapes_say)


def order_given_by(order: Order, walk: Walk, outputs: Sequence[Tensor], *, packs: bool) -> Hashable | None:
    """What is equal for graphs of one kind that have their samples at the same indices; None if it is not known.

    Args:
        order: what decides it for this kind.
        walk: through one of these graphs.
        outputs: what the graph is of.
        packs: whether nodes are supposed to have their saved tensors with hooks where torch does not show it.
    """
    if order.movers is None or not order.is_derived:
        return None
    nodes, movers = list(walk.nodes), sorted(order.movers, key=itemgetter(0))
    found = [Mover(nodes[number], places) for number, places in movers]
    moved = [_moved_by(one, walk.n or 0, packs=packs) for one in found]
    told = None if None in moved else _told([one for one in found if one.node.name() in ASKED], nodes, outputs)
    return None if told is None else (walk.n, walk.shapes, walk.wiring, axes_of_each(nodes), tuple(moved), told)


def _told(
    movers: Sequence[Mover], nodes: Sequence[Node], outputs: Sequence[Tensor]
) -> tuple[tuple[float, ...], ...] | None:
    """What nodes tell that show too little of what they do; None if one of them does not tell that it keeps to an order.

    They are called, unless hooks on saved tensors could notice.
    """
    if not movers:
        return ()
    if any_may_be_packed(nodes):
        return None
    with calling_nodes(outputs), torch.no_grad():
        answers = [_asked(one) for one in movers]
    known = [answer for answer in answers if answer is not None]
    told = [tuple(numbers.tolist()) for numbers in together_on_host(known)]
    return tuple(told) if len(known) == len(movers) and all(numbers[0] for numbers in told) else None


def _asked(mover: Mover) -> Tensor | None:
    """What a node tells of where it puts entries, behind a number that says whether that is all; None if it cannot be asked.

    Of a write that keeps samples in order along an axis, nothing more is to be told.
    """
    if mover.node.name() == MASKED_SCATTER:
        (shape,) = output_shapes([mover.node])
        put = saved(mover.node, "index").expand(shape)
        in_rows = put.flatten(1).sum(1) if put.dim() > 1 else put.reshape(-1)
        return torch.cat([put.new_ones(1), in_rows])
    if not mover.places:
        return mark_of(mover.node)
    flag = keeps_order(mover.node, mover.places[0])
    return None if flag is None else flag[None]


def _moved_by(mover: Mover, n: int, *, packs: bool) -> Hashable | None:
    """What decides where a node puts entries; None for a node that does not show it.

    It is equal for two nodes that put their entries alike. Of an index on the host it has the numbers themselves, so that it
    does not matter whether they come from the data. The host would have to wait in every step for those of another device, which
    is why such an index is known by being the same tensor, which nobody has changed.
    """
    node: Any = mover.node
    kind = node.name()
    if is_python_function(node):
        numbers = numbers_of_function(node, n)
        return _same(kind, numbers.values()) if numbers else None
    if kind in (COPY_SLICES, MASKED_SCATTER):
        return mover.places
    if "Index" in kind and knows(kind, "indices"):
        if may_have_packed_tensors(node, packs):
            return None
        indices: Sequence[Tensor | None] = saved(node, "indices")
        places = range(len(indices)) if mover.places is None else mover.places
        return _same(kind, [places, *[indices[place] for place in places]])
    if knows(kind, "axis", "index") and kind != "SelectBackward0":
        packed = may_have_packed_tensors(node, packs)
        return None if packed else _same(kind, (saved(node, "axis"), saved(node, "index")))
    return settings(node)


def _same(kind: str, values: Iterable[Any]) -> Hashable | None:
    """What some indices and settings are; None if they are too many, or don't count their changes."""
    found: list[Hashable] = [kind]
    for value in values:
        if not isinstance(value, Tensor):
            found.append(str(value))
        elif value.numel() > LARGEST_INDEX:
            return None
        elif value.device.type == "cpu":
            found.append((tuple(value.shape), value.dtype, value.detach().numpy().tobytes()))
        elif value.is_inference():
            return None
        else:
            found.append(SameTensor.of(value))
    return tuple(found)
