"""The derivation: where tensors in one graph have their samples, from what its nodes saved, without a backward pass.

A router reorders rows in each step, so that placements behind it cannot be remembered. But its nodes have saved where each row
came from, and labels follow these indices from the outputs back to the inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from torch_secorder.autograd.double_precision import together_on_host
from torch_secorder.autograd.nodes import Edge, has_packed_tensors, is_python_function, output_shapes
from torch_secorder.autograd.route import Route
from torch_secorder.batch_axis.evidence import Finding, Unplaced, candidates
from torch_secorder.batch_axis.label_rules import At, indices_of, labels_of_inputs, reads_tensors
from torch_secorder.batch_axis.labels import NOBODY, SEVERAL, Labels, joined, joined_along, reshaped
from torch_secorder.batch_axis.placement import Layout, Placement
from torch_secorder.batch_axis.search_pass import Viewed


class Derivation:
    """The labels of all gradients in one graph.

    Args:
        placed: the model's outputs, and where each has its samples; an output without samples is left out.
        n: the number of samples.
        ends: the nodes where the graph ends.
    """

    def __init__(self, placed: Sequence[tuple[Tensor, Placement | None]], n: int, ends: Iterable[Node]):
        self._placed = [(x, where) for x, where in placed if where is not None]
        self._n, self._ends = n, list(ends)
        self._labels: dict[Edge, Labels | None] | None = None

    @property
    def has_several_outputs(self) -> bool:
        """Whether several outputs have samples, so that one of them may compare the samples of another."""
        return len(self._placed) > 1

    def findings(self, wanted: Sequence[Viewed]) -> list[Finding] | None:
        """The findings from the labels at these edges, each viewed in its shape; None if nodes of the graph hide what they do."""
        if self._labels is None:
            self._labels = self._followed()
        if self._labels is None:
            return None
        return [self._finding(edge, tuple(shape)) for edge, shape in wanted]

    def _followed(self) -> dict[Edge, Labels | None] | None:
        if any(x.is_nested for x, _ in self._placed):
            return None
        found: dict[Edge, Labels | None] = {}
        roots = [get_gradient_edge(x) for x, _ in self._placed]
        for edge, (x, where) in zip(roots, self._placed, strict=True):
            key = (edge.node, edge.output_nr)
            found[key] = joined(found.get(key), _of_output(x, where, self._n))
        route = Route([edge.node for edge in roots], self._ends)
        if route.hidden or any(map(_hides, route.order)):
            return None
        shapes = dict(zip(route.order, map(_shapes, route.order), strict=True))
        indices = _indices_on_host(route.order)
        for node in route.order:
            labels = [found.get((node, nr)) for nr in range(len(shapes[node]))]
            if not node.next_functions or all(one is None for one in labels):
                continue
            inputs = [shapes[child][nr] if child in shapes else None for child, nr in node.next_functions]
            at = At(node, labels, shapes[node], inputs, indices.get(node, ()))
            for (child, nr), own in zip(node.next_functions, labels_of_inputs(at), strict=True):
                if child is not None and own is not None:
                    found[child, nr] = joined(found.get((child, nr)), own)
        self._shapes = shapes
        return found

    def _finding(self, edge: GradientEdge, shape: tuple[int, ...]) -> Finding:
        assert self._labels is not None
        labels = self._labels.get((edge.node, edge.output_nr))
        if labels is None or 0 in shape:
            return Finding(Unplaced.NO_GRADIENT)
        labels = reshaped(labels, self._shapes[edge.node][edge.output_nr], shape)
        if (labels == NOBODY).all():
            return Finding(Unplaced.NO_GRADIENT)
        if not shape or (labels == SEVERAL).any():
            return Finding(Unplaced.SHARED_BY_SAMPLES)
        for placement in candidates(shape, self._n):
            if _explains(labels, placement, shape[placement.axis], self._n):
                return Finding(placement)
        return self._listed(labels, shape)

    def _listed(self, labels: Labels, shape: tuple[int, ...]) -> Finding:
        rows = joined_along(labels, range(1, len(shape))).reshape(-1)
        if (rows == SEVERAL).any():
            return Finding(Unplaced.SHARED_BY_SAMPLES)
        # A row without a gradient may belong to any sample.
        rows = np.broadcast_to(np.where(rows == NOBODY, 0, rows), shape[:1])
        return Finding(Placement(0, Layout.INDEXED, torch.from_numpy(rows.copy())))


def _explains(labels: Labels, placement: Placement, size: int, n: int) -> bool:
    """Whether the labels at each index along a placement's axis are those of the index's sample, or NOBODY."""
    axis = placement.axis
    own = placement.sample_of_index(size, n, torch.device("cpu"))
    samples = np.arange(n) if own is None else own.numpy()
    expected = samples.reshape([-1 if other == axis else 1 for other in range(labels.ndim)])
    return bool(((labels == expected) | (labels == NOBODY)).all())


def _of_output(x: Tensor, where: Placement, n: int) -> Labels:
    """The labels of an output's gradient."""
    if not x.dim():
        return np.zeros((), np.int64)
    own = where.sample_of_index(x.shape[where.axis], n, torch.device("cpu"))
    samples = np.arange(n) if own is None else own.numpy()
    return samples.reshape([-1 if axis == where.axis else 1 for axis in range(x.dim())])


def _shapes(node: Node) -> tuple[tuple[int, ...], ...]:
    variable = getattr(node, "variable", None)
    return output_shapes([node]) if variable is None else (tuple(variable.shape),)


def _indices_on_host(nodes: Iterable[Node]) -> dict[Node, list[Tensor | None]]:
    """The indices that nodes saved; those on a device go to the host in one copy, so that the host waits only once."""
    found = {node: list(own) for node in nodes if (own := indices_of(node)) is not None}
    away = [
        (several, place, x)
        for several in found.values()
        for place, x in enumerate(several)
        if x is not None and x.device.type != "cpu"
    ]
    # Indices are exact in float64. An index that is the same for all features is copied only once.
    copies = together_on_host([_without_repetitions(x) for *_, x in away])
    for (several, place, x), copy in zip(away, copies, strict=True):
        several[place] = copy.to(x.dtype).expand(x.shape)
    return found


def _without_repetitions(x: Tensor) -> Tensor:
    for axis, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if size and not stride:
            x = x.narrow(axis, 0, 1)
    return x


def _hides(node: Node) -> bool:
    """Whether a node may use more than the gradients that it gets, or has saved tensors that are costly to read."""
    return is_python_function(node) or (reads_tensors(node) and has_packed_tensors(node) is True)
