"""Whether a graph can be read in one way only: with the samples on the first axis of the outputs, where they are assumed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Mapping, Sequence
from enum import Enum
from functools import partial
from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from torch_secorder.autograd.roots import sequence_number
from torch_secorder.batch_axis.evidence import Doubt
from torch_secorder.batch_axis.knowledge import PlacementCache
from torch_secorder.batch_axis.of_parameters import is_of_parameters
from torch_secorder.batch_axis.placement import FIRST, Placement
from torch_secorder.batch_axis.search import SampleSearch
from torch_secorder.batch_axis.search_pass import SearchPasses
from torch_secorder.capture.own_axes import OwnAxis
from torch_secorder.errors import ShapeError
from torch_secorder.graph.call_places import wanted_of_calls
from torch_secorder.graph.carried_axes import CarriedAxis
from torch_secorder.graph.graph import Graph
from torch_secorder.graph.other_axis import (
    first_axis_explains_all,
    hides_data,
    other_axis_that_fits,
    places_in,
)
from torch_secorder.graph.own_parameters import first_of_own_parameters
from torch_secorder.graph.samples_in_data import takes_all_samples
from torch_secorder.graph.walk import Walk
from torch_secorder.model.containers import Key
from torch_secorder.model.parameters import Table


class Reading(NamedTuple):
    """A graph that is asked where it has its samples.

    Attributes:
        graph: the graph.
        search: what was searched in it, and is to be searched there besides.
        own_axes: the axes on which samples must be, or must not be.
        asks: whether this is asked now, and not only what graphs of its kind have answered.
    """

    graph: Graph
    search: SampleSearch
    own_axes: Sequence[OwnAxis | CarriedAxis]
    asks: bool = True


class Shown(Enum):
    """What shows that an output has its samples on the first axis."""

    BY_DATA = "something takes single samples of an argument, or another batch has shown it"
    BY_GRAPH = "no other axis fits, which shows something only if the first one explains everything"
    BY_NOTHING = "it is believed"


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

    What one output shows says nothing of another, so that each is asked by itself, unless samples are checked afterwards or the
    user has said where they are. Ranks that hold the model together make the same passes, and ask for all outputs at once.

    Args:
        reading: the graph, as it was searched.
        table: the analyzed parameters.
        believes_first_axis: whether the first axis is believed where nothing shows another.
        checks_samples: whether samples are run alone afterwards.

    Raises:
        ShapeError: where the outputs are asked together, if that is so.
    """
    graph, search, _, asks = reading
    known, forward, n = search.placements, graph.forward, graph.forward.n or 0
    names = {id(x): key for key, x in forward.keyed_outputs()}
    keys = [names.get(id(x)) for x, _ in graph.placed]
    told = {number for number, key in enumerate(keys) if key is not None and forward.words.is_named("outputs", key)}
    asked = [
        number
        for number, (x, where) in enumerate(graph.placed)
        if where == FIRST and n in x.shape[1:] and number not in told
    ]
    if not asked:
        return {}
    together = checks_samples or table.ranks.distributed or sum(where is not None for _, where in graph.placed) == 1
    if asks and together:
        answer = _answer(reading, table, believes_first_axis)
        known.doubts = {asked[0]: answer} if isinstance(answer, Doubt) else {}
    elif asks:
        each = _EachOutput(reading, table, believes_first_axis, told)
        known.doubts = each.doubts([number for number in asked if number not in known.comparing])
    doubts = {number: one for number, one in known.doubts.items() if one.contradiction or not believes_first_axis()}
    of_each = {} if together else {key: doubts[number].axis for number, key in enumerate(keys) if number in doubts}
    refused = {number: _refusal(graph, one, of_each) for number, one in doubts.items()}
    if refused and together:
        raise next(iter(refused.values()))
    return refused


class _EachOutput:
    """Asks each of several outputs by itself where its samples are.

    Args:
        whole: the graph of all outputs.
        table: the analyzed parameters.
        believes_first_axis: whether the first axis is believed where nothing shows another.
        told: the numbers of outputs of which the user has said it.
    """

    def __init__(self, whole: Reading, table: Table, believes_first_axis: Callable[[], bool], told: set[int]):
        self._whole, self._table, self._believes_first_axis = whole, table, believes_first_axis
        self._placed = whole.graph.placed
        # The outputs that have their samples where they are placed.
        self._shown = {number for number in told if self._placed[number][1] is not None}
        self._alone: dict[int, Reading] = {}

    def doubts(self, asked: Sequence[int]) -> dict[int, Doubt]:
        """What these outputs leave open, each by itself, and what others don't settle.

        What is asked first is the output that was computed last: it may show the samples of those that it was computed from.
        """
        found: dict[int, Doubt] = {}
        edges = [get_gradient_edge(x) for x, _ in self._placed]
        left = sorted(asked, key=lambda number: sequence_number(edges[number].node), reverse=True)
        while left:
            number, *left = left
            answer = _answer(self._of(number), self._table, self._believes_first_axis)
            if isinstance(answer, Doubt):
                found[number] = answer
            elif answer is Shown.BY_DATA or (
                answer is Shown.BY_GRAPH and first_axis_explains_all(self._of(number).graph)
            ):
                inside = _shown_by(self._of(number).graph, [self._placed[other][0] for other in left])
                self._shown.update([number, *itertools.compress(left, inside)])
                left = [other for other, is_shown in zip(left, inside, strict=True) if not is_shown]
        if not all(doubt.contradiction for doubt in found.values()):
            self._ask_others({*asked, *self._shown})
        return self._unsettled(dict(sorted(found.items())))

    def _of(self, number: int) -> Reading:
        """The graph of one output alone, of which the calls were searched."""
        if number not in self._alone:
            whole, forward = self._whole.graph.walk, self._whole.graph.forward
            graph = Graph(
                Walk([self._placed[number][0]], forward, whole.leaves, whole.unfolded), [self._placed[number]], forward
            )
            passes = partial(SearchPasses, graph.placed, forward.n or 0)
            search = SampleSearch(PlacementCache(), forward.n or 0, True, passes, expected=graph.derivation)
            search(wanted_of_calls(graph.walk.calls))
            own_axes = [one for one in self._whole.own_axes if one.edge.node in graph.walk.nodes]
            self._alone[number] = Reading(graph, search, own_axes)
        return self._alone[number]

    def _ask_others(self, known: Container[int]) -> None:
        """Ask outputs that have the samples on no axis but the first, or none: they show them only if data does."""
        comparing = self._whole.search.placements.comparing
        for number, (_, where) in enumerate(self._placed):
            if where == FIRST and number not in known and number not in comparing:
                one = self._of(number)
                if False in takes_all_samples(one.graph, one.search, self._table).values():
                    self._shown.add(number)

    def _unsettled(self, doubts: dict[int, Doubt]) -> dict[int, Doubt]:
        """The doubts that other outputs don't settle, which show of places that lead to both where the samples are."""
        while self._shown and (left := [number for number, doubt in doubts.items() if not doubt.contradiction]):
            placed = [(x, where if number in self._shown else None) for number, (x, where) in enumerate(self._placed)]
            settled = [number for number in left if _is_settled(self._of(number), self._table, placed)]
            if not settled:
                break
            self._shown.update(settled)
            doubts = {number: doubt for number, doubt in doubts.items() if number not in settled}
        return doubts


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


def _answer(reading: Reading, table: Table, believes_first_axis: Callable[[], bool]) -> Doubt | Shown:
    """What makes another axis possible or the first one impossible; else what shows the samples on the first."""
    graph, search, own_axes, _ = reading
    n = graph.forward.n or 0
    shape = next(tuple(x.shape) for x, where in graph.placed if where == FIRST and n in x.shape[1:])
    axis = shape.index(n, 1)
    told = takes_all_samples(graph, search, table)
    if False in told.values():
        return Shown.BY_DATA
    if told:
        return Doubt(shape, axis, f"{next(iter(told))}: it takes all of the model's samples for each index")
    if (name := first_of_own_parameters(graph, table)) is not None:
        return Doubt(shape, axis, f"{name}: each index has such parameters of its own, that no other index uses,")
    if table.ranks.distributed or hides_data(graph) or _is_of_parameters(graph):
        return Shown.BY_NOTHING
    if believes_first_axis():
        return Shown.BY_DATA
    fits = other_axis_that_fits(graph, table, own_axes)
    return Shown.BY_GRAPH if fits is None else Doubt(shape, fits, "")


def _is_of_parameters(graph: Graph) -> bool:
    """Whether one output is what was computed from parameters alone, once for each sample."""
    node, forward = graph.placed[0][0].grad_fn, graph.forward
    if node is None or len(graph.placed) > 1 or node.name() != "ExpandBackward0" or node.next_functions[0][0] is None:
        return False
    return is_of_parameters(node.next_functions[0][0], forward.inputs, forward.has_packed_inputs)


def _refusal(graph: Graph, doubt: Doubt, of_each: Mapping[Key | None, int]) -> ShapeError:
    """What is refused, and what to pass in each of the two cases, of all outputs in doubt if they are asked one by one."""
    n, count, (shape, axis, contradiction) = graph.forward.n, graph.forward.count, doubt
    first, other = (f"{dict.fromkeys(of_each, 0)}", f"{of_each}") if of_each else ("0", f"{axis}")
    none = ", and None in the place of the axis for another output that has no samples" if of_each else ""
    if contradiction:
        return ShapeError(
            f"{contradiction} on axis 0 of an output of shape {shape} that it leads to, where the model has {count}: if the "
            f"samples are on axis {axis} of that output, behind steps or members of an ensemble, pass "
            f"batch_axis={{'outputs': {other}}}{none}; if they are on axis 0, since the model mixes or sorts its samples, pass "
            f"batch_axis={{'outputs': {first}}}"
        )
    return ShapeError(
        f"the model's {count} may be on axis 0 or on axis {axis} of an output of shape {shape}: both have {n} indices, and what "
        f"the model has computed without parameters shows no samples: pass batch_axis={{'outputs': {first}}} if they are on "
        f"axis 0, batch_axis={{'outputs': {other}}} if steps are there{none}"
    )
