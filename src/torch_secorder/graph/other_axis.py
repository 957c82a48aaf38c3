"""Whether the samples may as well be on another axis of the outputs than on the first, for all that the graph shows."""

from __future__ import annotations

from collections.abc import Sequence

from torch.autograd.graph import GradientEdge, Node

from torch_secorder.autograd.nodes import value_shape
from torch_secorder.batch_axis.evidence import Finding
from torch_secorder.batch_axis.placement import FIRST, Placement
from torch_secorder.batch_axis.search_pass import SearchPasses, Viewed
from torch_secorder.capture.own_axes import OwnAxis, has_samples_first
from torch_secorder.graph.carried_axes import CarriedAxis
from torch_secorder.graph.graph import Graph
from torch_secorder.graph.own_parameters import may_share_parameters
from torch_secorder.model.parameters import Table

# Nodes of layers of channels, which have the samples on the first axis.
_NAMES = (
    "Convolution ConvolutionOverrideable MkldnnConvolution NativeBatchNorm CudnnBatchNorm NativeGroupNorm EmbeddingBag"
)
HAVE_SAMPLES_FIRST = {f"{name}Backward0" for name in _NAMES.split()}


def other_axis_that_fits(graph: Graph, table: Table, own_axes: Sequence[OwnAxis | CarriedAxis]) -> int | None:
    """The first axis of the outputs besides axis 0 that explains as many gradients as that one does; None if there is none.

    An axis is none of samples if its indices have parameters of their own, as features have, or if a layer has its batch axis
    elsewhere.

    Args:
        graph: the graph, whose outputs have as many indices on that axis as there are samples.
        table: the analyzed parameters.
        own_axes: the axes on which samples must be, or must not be.
    """
    n, walk = graph.forward.n or 0, graph.walk
    shapes = [x.shape for x, where in graph.placed if where == FIRST]
    axes = {
        axis
        for shape in shapes
        for axis in range(1, len(shape))
        if shape[axis] == n and may_share_parameters(graph, table, axis, of_features=axis == len(shape) - 1)
    }
    if not axes:
        return None
    channels = [node for node in walk.nodes if node.name() in HAVE_SAMPLES_FIRST]
    calls: list[Viewed] = [(edge, record.shape) for record, edge in walk.calls]
    own: list[Viewed] = [(one.edge, one.shape) for one in own_axes]
    # What mixes steps may be behind something that is not analyzed.
    viewed = [*calls, *own, *map(_output, channels), *map(_output, walk.nodes)]
    known = _placements(SearchPasses(graph.placed, n).findings(viewed))
    for axis in sorted(axes):
        where = Placement(axis)
        placed = [(x, where if x.dim() > axis and x.shape[axis] == n else None) for x, _ in graph.placed]
        found = _placements(SearchPasses(placed, n).findings(viewed))
        of_calls, of_own, of_channels = found[: len(calls)], found[len(calls) :], found[len(calls) + len(own) :]
        if sum(one is not None for one in found) < sum(one is not None for one in known):
            continue
        if any(
            one is not None and one.axis and has_samples_first(record.site.module, len(record.shape))
            for one, (record, _) in zip(of_calls, walk.calls, strict=True)
        ):
            continue
        if any(one is not None and one.axis for one in of_channels[: len(channels)]):
            continue
        if any(
            one is not None and (by.contradicts(one) or (isinstance(by, OwnAxis) and one.axis != by.axis))
            for one, by in zip(of_own, own_axes, strict=False)
        ):
            continue
        return axis
    return None


def _output(node: Node) -> Viewed:
    return GradientEdge(node, 0), value_shape(node, 0)


def _placements(found: Sequence[Finding]) -> list[Placement | None]:
    return [one.evidence if isinstance(one.evidence, Placement) else None for one in found]
