"""Whether each index on the first axis of the outputs has parameters of its own, as members of an ensemble have."""

from __future__ import annotations

import numpy as np
from torch.autograd.graph import GradientEdge

from torch_secorder.batch_axis.labels import Labels
from torch_secorder.graph.graph import Graph
from torch_secorder.model.parameters import Table


def first_of_own_parameters(graph: Graph, table: Table) -> str | None:
    """The name of the first parameter of which some entries are used for one index alone, if each index has such ones.

    What data shows of the samples comes before this: a router may have sent each sample to an expert of its own.
    """
    derivation, leaves = graph.derivation(), graph.walk.leaves
    if not derivation.tells:
        return None
    labels = derivation.labels([GradientEdge(leaf, 0) for leaf in leaves])
    own = [
        (position, _samples_alone(one))
        for position, one in zip(leaves.values(), labels, strict=True)
        if one is not None
    ]
    of_all = set[int]().union(*(samples for _, samples in own))
    if len(of_all) < (graph.forward.n or 0):
        return None
    return next(table.names[position] for position, samples in own if samples)


def _samples_alone(labels: Labels) -> set[int]:
    """The samples that have entries of their own."""
    return {int(sample) for sample in np.unique(labels) if sample >= 0}
