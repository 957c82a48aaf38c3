"""Whether the samples may as well be on another axis of the outputs than on the first, for all that the graph shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import itemgetter

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from torch_secorder.autograd.nodes import any_may_be_packed, is_python_function, value_shape
from torch_secorder.autograd.opaque import is_opaque
from torch_secorder.batch_axis.evidence import Evidence, Finding, Unplaced
from torch_secorder.batch_axis.placement import FIRST, Placement
from torch_secorder.batch_axis.search_pass import SearchPasses, Viewed
from torch_secorder.capture.own_axes import OwnAxis, has_samples_first
from torch_secorder.graph.carried_axes import CarriedAxis
from torch_secorder.graph.graph import Graph
from torch_secorder.graph.own_parameters import may_share_parameters
from torch_secorder.graph.walk import Walk
from torch_secorder.model.parameters import Table

COPIES = "torch::autograd::CopySlices"

# A place, and what says whether samples that are found there contradict what is known.
Fixed = tuple[Viewed, Callable[[Evidence], bool]]

# Nodes of layers of channels, which have the samples on the first axis.
_NAMES = (
    "Convolution ConvolutionOverrideable MkldnnConvolution NativeBatchNorm CudnnBatchNorm NativeGroupNorm EmbeddingBag"
)
HAVE_SAMPLES_FIRST = {f"{name}Backward0" for name in _NAMES.split()}


def other_axis_that_fits(
    graph: Graph,
    table: Table,
    own_axes: Sequence[OwnAxis | CarriedAxis],
    shown: Sequence[tuple[Viewed, Placement]] = (),
) -> int | None:
    """The first axis of the outputs besides axis 0 that may have the samples as well; None if there is none.

    An axis is none of samples if its indices have parameters of their own, as features have, if a layer has its batch axis
    elsewhere, if none of the data would belong to single samples, or if all would share what the first axis gives to single ones.
    What has as many indices on one axis only, such as positions, may be shared by all samples.

    Args:
        graph: the graph, whose outputs have as many indices on that axis as there are samples.
        table: the analyzed parameters.
        own_axes: the axes on which samples must be, or must not be.
        shown: places whose samples other outputs have shown.
    """
    n = graph.forward.n or 0
    axes = _possible_axes(graph, table)
    if not axes:
        return None
    of_others: list[Fixed] = [(place, partial(_is_elsewhere, place, where, n)) for place, where in shown]
    fixed = [*of_others, *_fixed(graph, own_axes)]
    # What mixes steps may be behind something that is not analyzed.
    viewed = [*map(itemgetter(0), fixed), *places_in(graph.walk)]
    known = SearchPasses(graph.placed, n).findings(viewed)
    if _is_contradicted(known, of_others, by=Placement):
        return axes[0]
    taking = set(_that_take_data(graph.walk))
    for axis in axes:
        found = SearchPasses(graph.placed_along(axis), n).findings(viewed)
        explains_less = _explained(found, viewed, n) < _explained(known, viewed, n)
        if not explains_less and _are_of_data(found, viewed, taking) and not _is_contradicted(found, fixed):
            return axis
    return None


def _possible_axes(graph: Graph, table: Table) -> list[int]:
    """The axes of the outputs besides axis 0 whose indices are as many as the samples, and may use the same parameters."""
    n, shapes = graph.forward.n, [x.shape for x, where in graph.placed if where == FIRST]
    return [
        axis
        for axis in range(1, max(map(len, shapes)))
        if any(shape[axis : axis + 1] == (n,) for shape in shapes)
        and may_share_parameters(graph, table, axis, of_features=any(axis == len(shape) - 1 for shape in shapes))
    ]


def first_axis_explains_all(graph: Graph) -> bool:
    """Whether nothing belongs to all samples that has room for single ones, if these are on the first axis of the outputs."""
    n, viewed = graph.forward.n or 0, places_in(graph.walk)
    found = SearchPasses(graph.placed, n).findings(viewed)
    return not any(
        one.evidence is Unplaced.SHARED_BY_SAMPLES and _may_have_samples(place, n)
        for place, one in zip(viewed, found, strict=True)
    )


def hides_data(graph: Graph) -> bool:
    """Whether checkpoints or functions hide a part of a graph, or of the data, so that nobody can say what it shows."""
    if graph.forward.has_packed_inputs and any_may_be_packed(graph.walk.numbered):
        return True
    is_hidden = any(is_python_function(node) and is_opaque(node) for node in graph.walk.nodes)
    return is_hidden or graph.derivation(calls_functions=True).findings([]) is None


def places_in(walk: Walk) -> list[Viewed]:
    """The outputs of a graph's calls, and of its other nodes."""
    # What arrives at a node that changes a part of a tensor in place is not the gradient of all that it returned.
    nodes = [node for node in walk.nodes if node.name() != COPIES]
    return [*((edge, record.shape) for record, edge in walk.calls), *map(_output, nodes)]


def _may_have_samples(place: Viewed, n: int) -> bool:
    """Whether a place has room for samples besides as many indices of another axis, in front of its features."""
    rows = math.prod(place[1][:-1])
    return rows > 0 and rows % n**2 == 0


def _explained(found: Sequence[Finding], viewed: Sequence[Viewed], n: int) -> int:
    """In how many places samples were found, of those that have room for them beside as many steps."""
    pairs = zip(found, viewed, strict=True)
    return sum(isinstance(one.evidence, Placement) and _may_have_samples(place, n) for one, place in pairs)


def _are_of_data(found: Sequence[Finding], viewed: Sequence[Viewed], taking: set[GradientEdge]) -> bool:
    """Whether some of what takes data belongs to single samples, which are made of it, if anything takes any."""
    with_samples = {place[0] for place, one in zip(viewed, found, strict=True) if isinstance(one.evidence, Placement)}
    return not taking or not with_samples.isdisjoint(taking)


def _that_take_data(walk: Walk) -> Iterator[GradientEdge]:
    """Where the gradients arrive of calls and nodes that take something which has no gradient."""
    for record, edge in walk.calls:
        # What is kept for a checkpoint may be data.
        if record.inputs is None or any(not (isinstance(x, Tensor) and x.requires_grad) for x in record.inputs):
            yield edge
    for node in walk.nodes:
        if node not in walk.records and None in [child for child, _ in node.next_functions]:
            yield GradientEdge(node, 0)


def _is_contradicted(found: Sequence[Finding], fixed: Sequence[Fixed], by: type = object) -> bool:
    """Whether samples were found where they can't be, beyond doubt; the first places are those that are fixed."""
    pairs = zip(found, fixed, strict=False)
    return any(
        one.proven and isinstance(one.evidence, by) and contradicts(one.evidence) for one, (_, contradicts) in pairs
    )


def _fixed(graph: Graph, own_axes: Sequence[OwnAxis | CarriedAxis]) -> Iterator[Fixed]:
    """The places on whose axes not any samples can be, with what says whether samples that are found there contradict that."""
    walk = graph.walk
    for record, edge in walk.calls:
        if has_samples_first(record.site.module, len(record.shape)):
            yield (edge, record.shape), _is_not_first
    for node in walk.nodes:
        if node.name() in HAVE_SAMPLES_FIRST:
            yield _output(node), _is_not_first
    for own in own_axes:
        yield (own.edge, own.shape), partial(_is_another, own)


def _is_not_first(found: Evidence) -> bool:
    return isinstance(found, Placement) and found.axis != 0


def _is_another(own: OwnAxis | CarriedAxis, found: Evidence) -> bool:
    is_other = isinstance(own, OwnAxis) and isinstance(found, Placement) and found.axis != own.axis
    return is_other or (isinstance(found, Placement) and own.contradicts(found))


def _is_elsewhere(place: Viewed, where: Placement, n: int, found: Evidence) -> bool:
    """Whether samples are somewhere else, or all of them share what belongs to single ones."""
    is_shared = found is Unplaced.SHARED_BY_SAMPLES
    return is_shared or (isinstance(found, Placement) and not where.agrees(found, place[1], n))


def _output(node: Node) -> Viewed:
    return GradientEdge(node, 0), value_shape(node, 0)
