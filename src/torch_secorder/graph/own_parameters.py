"""Whether each index on the first axis of the outputs has parameters of its own, as members of an ensemble have."""

from __future__ import annotations

import numpy as np
from torch.autograd.graph import GradientEdge

from torch_secorder.batch_axis.labels import SEVERAL, Labels
from torch_secorder.graph.graph import Graph
from torch_secorder.model.parameters import Table


def first_of_own_parameters(graph: Graph, table: Table) -> str | None:
    """The name of the first parameter of which some entries are used for one index alone, if each index has such ones.

    What data shows of the samples comes before this: a router may have sent each sample to an expert of its own. Members have all
    samples in common, so that such an entry is used for several indices of the axis where these would be then. An entry that is
    known to be used for a single one, as rows that are chosen for samples are, is no member's.
    """
    derivation, leaves, n = graph.derivation(), graph.walk.leaves, graph.forward.n or 0
    if not derivation.tells:
        return None
    edges = [GradientEdge(leaf, 0) for leaf in leaves]
    labels = derivation.labels(edges)
    axes = {axis for x, _ in graph.placed for axis in range(1, x.dim()) if x.shape[axis] == n}
    for axis in sorted(axes):
        other = graph.derivation_along(axis)
        known = [None] * len(edges) if other.findings([]) is None else other.labels(edges)
        own = [
            (position, _samples_alone(one, of_other))
            for position, one, of_other in zip(leaves.values(), labels, known, strict=True)
            if one is not None
        ]
        if len(set[int]().union(*(samples for _, samples in own))) == n:
            return next(table.names[position] for position, samples in own if samples)
    return None


def _samples_alone(labels: Labels, of_other: Labels | None) -> set[int]:
    """The samples that have entries of their own, of those entries that another reading may take for those of several."""
    if of_other is not None:
        labels, of_other = np.broadcast_arrays(labels, of_other)
        labels = labels[of_other == SEVERAL]
    return {int(sample) for sample in np.unique(labels) if sample >= 0}
