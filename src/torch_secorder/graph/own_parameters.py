"""Whether each index on an axis of the outputs has parameters of its own, as members of an ensemble have."""

from __future__ import annotations

import numpy as np
from torch.autograd.graph import GradientEdge

from torch_secorder.batch_axis.derivation import Derivation
from torch_secorder.batch_axis.labels import SEVERAL, Labels
from torch_secorder.graph.graph import Graph
from torch_secorder.model.parameters import Table


def first_of_own_parameters(graph: Graph, table: Table) -> str | None:
    """The name of the first parameter of which some entries are used for one index alone, if each index has such ones.

    What data shows of the samples comes before this: a router may have sent each sample to an expert of its own. Members have all
    samples in common, so that such an entry is used for several indices of the axis where these would be then. An entry that is
    known to be used for a single one, as rows that are chosen for samples are, is no member's.
    """
    derivation, n = graph.derivation(), graph.forward.n
    if not derivation.tells:
        return None
    axes = {axis for x, _ in graph.placed for axis in range(1, x.dim()) if x.shape[axis] == n}
    names = (_first_of_own(graph, table, derivation, graph.derivation_along(axis)) for axis in sorted(axes))
    return next((name for name in names if name is not None), None)


def may_share_parameters(graph: Graph, table: Table, axis: int, *, of_features: bool) -> bool:
    """Whether the indices on another axis than the first use the same parameters, as samples do, as far as the nodes tell.

    Of an axis that may be one of features, an entry counts as one's own also if a single sample uses it on the first axis.
    """
    along, first = graph.derivation_along(axis), None if of_features else graph.derivation(calls_functions=True)
    return _first_of_own(graph, table, along, first) is None


def _first_of_own(graph: Graph, table: Table, derivation: Derivation, other: Derivation | None) -> str | None:
    """The first parameter with entries that one reading takes for those of one index, and another for those of several."""
    leaves = graph.walk.leaves
    edges = [GradientEdge(leaf, 0) for leaf in leaves]
    labels = derivation.labels(edges)
    tells = other is not None and other.findings([]) is not None
    known = other.labels(edges) if other is not None and tells else [None] * len(edges)
    own = [
        (position, _samples_alone(one, of_other))
        for position, one, of_other in zip(leaves.values(), labels, known, strict=True)
        if one is not None
    ]
    if len(set[int]().union(*(samples for _, samples in own))) == graph.forward.n:
        return next(table.names[position] for position, samples in own if samples)
    return None


def _samples_alone(labels: Labels, of_other: Labels | None) -> set[int]:
    """The samples that have entries of their own, of those entries that another reading may take for those of several."""
    if of_other is not None:
        labels, of_other = np.broadcast_arrays(labels, of_other)
        labels = labels[of_other == SEVERAL]
    return {int(sample) for sample in np.unique(labels) if sample >= 0}
