"""Whether the samples may as well be on another axis of the outputs than on the first, for all that the graph shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import itemgetter

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from torch_secorder.autograd.nodes import is_python_function, value_shape
from torch_secorder.autograd.opaque import is_opaque
from torch_secorder.batch_axis.evidence import Evidence, Unplaced
from torch_secorder.batch_axis.placement import FIRST, Placement
from torch_secorder.batch_axis.search_pass import SearchPasses, Viewed
from torch_secorder.capture.own_axes import OwnAxis, has_samples_first
from torch_secorder.graph.carried_axes import CarriedAxis
from torch_secorder.graph.graph import Graph
from torch_secorder.graph.own_parameters import may_share_parameters
from torch_secorder.graph.walk import Walk
from torch_secorder.model.parameters import Table

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
    """The first axis of the outputs besides axis 0 that explains as many gradients as that one does; None if there is none.

    An axis is none of samples if its indices have parameters of their own, as features have, or if a layer has its batch axis
    elsewhere. Where activation checkpoints hide a part of the graph or of the data, nobody can say so.

    Args:
        graph: the graph, whose outputs have as many indices on that axis as there are samples.
        table: the analyzed parameters.
        own_axes: the axes on which samples must be, or must not be.
        shown: places whose samples other outputs have shown.
    """
    n, walk = graph.forward.n or 0, graph.walk
    if graph.forward.has_packed_inputs or any(is_python_function(node) and is_opaque(node) for node in walk.nodes):
        return None
    shapes = [x.shape for x, where in graph.placed if where == FIRST]
    axes = {
        axis
        for shape in shapes
        for axis in range(1, len(shape))
        if shape[axis] == n and may_share_parameters(graph, table, axis, of_features=axis == len(shape) - 1)
    }
    if not axes:
        return None
    of_others: list[Fixed] = [(place, partial(_is_elsewhere, place, where, n)) for place, where in shown]
    fixed = [*of_others, *_fixed(graph, own_axes)]
    # What mixes steps may be behind something that is not analyzed.
    viewed = [*map(itemgetter(0), fixed), *places_in(walk)]
    known = _evidence(graph.placed, n, viewed)
    if _is_contradicted([one if isinstance(one, Placement) else None for one in known], of_others):
        return min(axes)
    for axis in sorted(axes):
        where = Placement(axis)
        placed = [(x, where if x.dim() > axis and x.shape[axis] == n else None) for x, _ in graph.placed]
        found = _evidence(placed, n, viewed)
        if _explained(found) >= _explained(known) and not _is_contradicted(found, fixed):
            return axis
    return None


def places_in(walk: Walk) -> list[Viewed]:
    """The outputs of a graph's calls, and of its other nodes."""
    return [*((edge, record.shape) for record, edge in walk.calls), *map(_output, walk.nodes)]


def _explained(found: Sequence[Evidence]) -> int:
    return sum(isinstance(one, Placement) for one in found)


def _is_contradicted(found: Sequence[Evidence | None], fixed: Sequence[Fixed]) -> bool:
    """Whether samples were found where they can't be; the first places are those that are fixed."""
    pairs = zip(found, fixed, strict=False)
    return any(contradicts(one) for one, (_, contradicts) in pairs if one is not None)


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


def _evidence(placed: Sequence[tuple[Tensor, Placement | None]], n: int, viewed: Sequence[Viewed]) -> list[Evidence]:
    return [one.evidence for one in SearchPasses(placed, n).findings(viewed)]
