"""What a search is asked for besides the outputs of calls."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence, Set

from torch.autograd.graph import GradientEdge, Node

from torch_secorder.autograd.nodes import value_shape
from torch_secorder.batch_axis.knowledge import Wanted
from torch_secorder.capture.own_axes import OwnAxis
from torch_secorder.capture.records import Record
from torch_secorder.graph.carried_axes import CarriedAxis
from torch_secorder.graph.walk import Walk

# How many nodes a chain from a parameter to the data is expected to have at most, so that one search pass sees all of it.
LOOK_AHEAD = 3


def wanted_of_nodes(nodes: Iterable[Node]) -> dict[Node, Wanted]:
    """The places of what nodes make that take something of the model's arguments, each known by its kind and its turn."""
    counts: Counter[str] = Counter()
    found: dict[Node, Wanted] = {}
    for node in dict.fromkeys(nodes):
        name = node.name()
        found[node] = ("use", f"argument/{name}", counts[name], 0), GradientEdge(node, 0), value_shape(node, 0)
        counts[name] += 1
    return found


def nodes_ahead(walk: Walk, reached: Sequence[tuple[Record, GradientEdge]], searched: Set[int]) -> list[Node]:
    """The nodes that a search may be asked for after the calls: a few steps above each parameter, and each unplaced call.

    With them come those of which graphs of the same kind were asked, which have these numbers. Where no graph of a kind holds for
    the next one, each is looked through once then, and not once for each level of the climb from the parameters.
    """
    consumers = (node for edges in walk.uses.values() for node, _ in edges)
    unplaced = (edge.node for record, edge in reached if record.placement is None)
    found = walk.above(itertools.chain(consumers, unplaced), LOOK_AHEAD)
    again = (node for number, node in enumerate(walk.numbered) if number in searched) if searched else ()
    return [*dict.fromkeys([*found, *again])]


def wanted_of_own_axes(own_axes: Sequence[OwnAxis | CarriedAxis]) -> list[Wanted]:
    """The places of outputs that have a batch axis of their own, or an axis that is none."""
    counts: Counter[str] = Counter()
    wanted: list[Wanted] = []
    for one in own_axes:
        wanted.append((("own axis", one.name, counts[one.name]), one.edge, one.shape))
        counts[one.name] += 1
    return wanted
