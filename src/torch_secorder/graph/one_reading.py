"""Whether a graph can be read in one way only: with the samples on the first axis of the outputs, where they are assumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from torch_secorder.autograd.nodes import value_shape
from torch_secorder.autograd.roots import sequence_number
from torch_secorder.batch_axis.evidence import Doubt
from torch_secorder.batch_axis.knowledge import PlacementCache
from torch_secorder.batch_axis.placement import FIRST, Placement
from torch_secorder.batch_axis.search import SampleSearch
from torch_secorder.batch_axis.search_pass import SearchPasses
from torch_secorder.capture.own_axes import OwnAxis
from torch_secorder.errors import ShapeError
from torch_secorder.graph.call_places import wanted_of_calls
from torch_secorder.graph.carried_axes import CarriedAxis
from torch_secorder.graph.graph import Graph
from torch_secorder.graph.other_axis import other_axis_that_fits, places_in
from torch_secorder.graph.own_parameters import first_of_own_parameters
from torch_secorder.graph.samples_in_data import takes_all_samples
from torch_secorder.graph.walk import Walk
from torch_secorder.model.parameters import Table


class Reading(NamedTuple):
    """A graph that is asked where it has its samples.

    Attributes:
        graph: the graph.
        search: what was searched in it, and is to be searched there besides.
        own_axes: the axes on which samples must be, or must not be.
    """

    graph: Graph
    search: SampleSearch
    own_axes: Sequence[OwnAxis | CarriedAxis]


def one_reading(
    reading: Reading,
    table: Table,
    believes_first_axis: Callable[[], bool],
    *,
    checks_samples: bool,
) -> dict[int, ShapeError]:
    """The refusals of outputs, by their numbers, that may have the samples on another axis than the first.

    Read along steps or members of an ensemble in front, what takes the model's samples takes all of them for each; and where no
    data shows that, each member still has parameters of its own. Steps of data that nothing follows may be in front or behind,
    unless a batch of another size has shown it.

    What one output shows says nothing of another, so that each is asked by itself, unless samples are checked afterwards. Ranks
    that hold the model together make the same passes, and ask for all outputs at once.

    Args:
        reading: the graph, as it was searched.
        table: the analyzed parameters.
        believes_first_axis: whether the first axis is believed where nothing shows another.
        checks_samples: whether samples are run alone afterwards.

    Raises:
        ShapeError: where the outputs are asked together, if that is so.
    """
    graph, search, _ = reading
    known, n = search.placements, graph.forward.n or 0
    outputs = [number for number, (x, where) in enumerate(graph.placed) if where == FIRST and n in x.shape[1:]]
    if not outputs:
        return {}
    together = checks_samples or table.ranks.distributed or sum(where is not None for _, where in graph.placed) == 1
    if search.examines and together:
        doubt = _doubt(reading, table, believes_first_axis, is_alone=True)
        known.doubts = {} if doubt is None else {outputs[0]: doubt}
    elif search.examines:
        asked = [number for number in outputs if number not in known.comparing]
        known.doubts = _doubts(reading, table, believes_first_axis, asked)
    refused = {
        number: _refusal(graph, doubt)
        for number, doubt in known.doubts.items()
        if doubt.contradiction or not believes_first_axis()
    }
    if refused and together:
        raise next(iter(refused.values()))
    return refused


def _of_output(reading: Reading, number: int) -> Reading:
    """The graph of one output alone, of which the calls were searched."""
    whole, (root, where) = reading.graph.walk, reading.graph.placed[number]
    forward = reading.graph.forward
    graph = Graph(Walk([root], forward, whole.leaves, whole.unfolded), [(root, where)], forward)
    passes = partial(SearchPasses, graph.placed, forward.n or 0)
    search = SampleSearch(PlacementCache(), forward.n or 0, True, passes, expected=graph.derivation)
    search(wanted_of_calls(graph.walk.calls))
    return Reading(graph, search, [one for one in reading.own_axes if one.edge.node in graph.walk.nodes])


def _doubts(
    reading: Reading, table: Table, believes_first_axis: Callable[[], bool], asked: Sequence[int]
) -> dict[int, Doubt]:
    """What these outputs leave open, each by itself, and what others don't settle.

    What is asked first is the output that was computed last: it may show the samples of those that it was computed from.
    """
    found: dict[int, Doubt] = {}
    alone: dict[int, Reading] = {}
    outputs = [x for x, _ in reading.graph.placed]
    left = sorted(asked, key=lambda number: sequence_number(get_gradient_edge(outputs[number]).node), reverse=True)
    while left:
        number, *left = left
        one = alone[number] = _of_output(reading, number)
        doubt = _doubt(one, table, believes_first_axis)
        if doubt is None:
            shown = _shown_by(one.graph, [outputs[other] for other in left])
            left = [other for other, is_shown in zip(left, shown, strict=True) if not is_shown]
        else:
            found[number] = doubt
    return _unsettled(reading, table, found, alone)


def _shown_by(graph: Graph, outputs: Sequence[Tensor]) -> list[bool]:
    """For each of these outputs whether a graph that it is a part of shows the samples on its first axis."""
    n = graph.forward.n or 0
    places = [(get_gradient_edge(x), x.shape) for x in outputs]
    inside = [place for place in places if place[0].node in graph.walk.nodes]
    found = SearchPasses(graph.placed, n).findings(inside) if inside else []
    shown = {
        edge
        for (edge, shape), one in zip(inside, found, strict=True)
        if one.proven and isinstance(one.evidence, Placement) and FIRST.agrees(one.evidence, shape, n)
    }
    return [edge in shown for edge, _ in places]


def _unsettled(
    reading: Reading, table: Table, doubts: dict[int, Doubt], alone: Mapping[int, Reading]
) -> dict[int, Doubt]:
    """The doubts that other outputs don't settle, which show of places that lead to both where the samples are.

    Args:
        reading: the graph of all outputs.
        table: the analyzed parameters.
        doubts: what is left open of outputs, by their numbers.
        alone: the graph of each output.
    """
    while open_ones := [number for number, doubt in doubts.items() if not doubt.contradiction]:
        left_out = {*doubts, *reading.search.placements.comparing}
        placed = [(x, None if number in left_out else where) for number, (x, where) in enumerate(reading.graph.placed)]
        if all(where is None for _, where in placed):
            break
        settled = [number for number in open_ones if _is_settled(alone[number], table, placed)]
        if not settled:
            break
        doubts = {number: doubt for number, doubt in doubts.items() if number not in settled}
    return doubts


def _is_settled(reading: Reading, table: Table, placed: Sequence[tuple[Tensor, Placement | None]]) -> bool:
    """Whether what these outputs show of places that lead to another one, too, excludes all of its axes but the first."""
    viewed = places_in(reading.graph.walk)
    found = SearchPasses(placed, reading.graph.forward.n or 0).findings(viewed)
    shown = [
        (place, one.evidence)
        for place, one in zip(viewed, found, strict=True)
        if one.proven and isinstance(one.evidence, Placement)
    ]
    return bool(shown) and other_axis_that_fits(reading.graph, table, reading.own_axes, shown) is None


def _doubt(
    reading: Reading, table: Table, believes_first_axis: Callable[[], bool], *, is_alone: bool = False
) -> Doubt | None:
    graph, search, own_axes = reading
    n = graph.forward.n or 0
    shape = next(tuple(x.shape) for x, where in graph.placed if where == FIRST and n in x.shape[1:])
    axis = shape.index(n, 1)
    told = takes_all_samples(graph, search, table)
    if False in told.values():
        return None
    if told:
        return Doubt(shape, axis, f"{next(iter(told))}: it takes all of the model's samples for each index", is_alone)
    if (name := first_of_own_parameters(graph, table)) is not None:
        own = f"{name}: each index has such parameters of its own, that no other index uses,"
        return Doubt(shape, axis, own, is_alone)
    if table.ranks.distributed or (not is_alone and _is_expanded(graph.placed[0][0])) or believes_first_axis():
        return None
    fits = other_axis_that_fits(graph, table, own_axes)
    return None if fits is None else Doubt(shape, fits, "", is_alone)


def _is_expanded(output: Tensor) -> bool:
    """Whether the indices on an output's first axis are the same one again, as of what all samples share."""
    node = output.grad_fn
    if node is None or node.name() != "ExpandBackward0" or (child := node.next_functions[0][0]) is None:
        return False
    own = value_shape(child, node.next_functions[0][1])
    return len(own) < output.dim() or own[0] != output.shape[0]


def _refusal(graph: Graph, doubt: Doubt) -> ShapeError:
    """What is refused, and what to pass in each of the two cases."""
    n, count, (shape, axis, contradiction, is_alone) = graph.forward.n, graph.forward.count, doubt
    of_one = "" if is_alone else ", with that output's position or key"
    first, other = ("0", f"{axis}") if is_alone else ("{0: 0}", f"{{0: {axis}}}")
    if contradiction:
        return ShapeError(
            f"{contradiction} on axis 0 of an output of shape {shape} that it leads to, where the model has {count}: if the "
            f"samples are on axis {axis} of that output, behind steps or members of an ensemble, pass "
            f"batch_axis={{'outputs': {other}}}{of_one}; if they are on axis 0, since the model mixes or sorts its samples, pass "
            f"batch_axis={{'outputs': {first}}}"
        )
    return ShapeError(
        f"the model's {count} may be on axis 0 or on axis {axis} of an output of shape {shape}: both have {n} indices, and what "
        f"the model has computed without parameters shows no samples: pass batch_axis={{'outputs': {first}}} if they are on "
        f"axis 0, batch_axis={{'outputs': {other}}} if steps are there{of_one}"
    )
