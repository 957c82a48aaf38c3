"""The derivation: where tensors in one graph have their samples, from what its nodes saved, without a backward pass.

Labels follow the nodes from the outputs back to the inputs. What they say of a tensor follows from the kinds and shapes of the
nodes, and from the settings and indices of those that move samples: in another graph with the same, the samples are at the same
places. What passes show beyond that depends on numbers, such as those of a mask, and may be otherwise in the next batch. A router
reorders rows in each step, so that placements behind it cannot be remembered, and labels are what tells them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from torch_secorder.autograd.double_precision import together_on_host
from torch_secorder.autograd.nodes import Edge, has_packed_tensors, is_python_function, output_shapes, outputs_of
from torch_secorder.autograd.route import Route
from torch_secorder.batch_axis.evidence import Finding, Unplaced, candidates
from torch_secorder.batch_axis.label_rules import At, indices_of, labels_of_inputs, reads_tensors
from torch_secorder.batch_axis.labels import (
    NOBODY,
    SEVERAL,
    Labels,
    differ_along,
    joined,
    joined_along,
    of_all,
    on_axis,
    reshaped,
)
from torch_secorder.batch_axis.moving import Mover, mover
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
        self._movers: list[Mover] = []

    @property
    def has_several_outputs(self) -> bool:
        """Whether several outputs have samples, so that one of them may compare the samples of another."""
        return len(self._placed) > 1

    @property
    def tells(self) -> bool:
        """Whether there are labels; there are none of nested tensors."""
        return self._labels is not None

    @property
    def movers(self) -> list[Mover]:
        """The nodes whose settings or indices decide where samples are."""
        return self._movers if self._labels is not None else []

    def findings(self, wanted: Sequence[Viewed]) -> list[Finding] | None:
        """The findings from the labels at these edges, each viewed in its shape; None if nodes of the graph hide what they do."""
        hides = self._route.hidden or any(map(_hides, self._route.order))
        return None if hides else self.suppositions(wanted)

    def suppositions(self, wanted: Sequence[Viewed]) -> list[Finding] | None:
        """The same where functions of Python's are supposed to leave samples where they are, which passes have to confirm.

        The result is None if some tensor in the graph is nested.
        """
        return None if self._labels is None else [self._finding(edge, tuple(shape)) for edge, shape in wanted]

    @cached_property
    def _route(self) -> Route:
        return Route([get_gradient_edge(x).node for x, _ in self._placed], self._ends)

    @cached_property
    def _labels(self) -> dict[Edge, Labels | None] | None:
        if any(output.is_nested_tensor for node in self._route.order for output in outputs_of(node)):
            return None
        found: dict[Edge, Labels | None] = {}
        for x, where in self._placed:
            edge = get_gradient_edge(x)
            key = (edge.node, edge.output_nr)
            found[key] = joined(found.get(key), _of_output(x, where, self._n))
        order = self._route.order
        self._shapes = dict(zip(order, map(_shapes, order), strict=True))
        indices = _indices_on_host(order)
        for node in order:
            labels = [found.get((node, nr)) for nr in range(len(self._shapes[node]))]
            if not node.next_functions or all(one is None for one in labels):
                continue
            inputs = [self._shapes[child][nr] if child in self._shapes else None for child, nr in node.next_functions]
            at = At(node, labels, self._shapes[node], inputs, indices.get(node, ()))
            of_inputs = _of_inputs(at)
            if (moving := mover(at, of_inputs, self._n)) is not None:
                self._movers.append(moving)
            for (child, nr), own in zip(node.next_functions, of_inputs, strict=True):
                if child is not None and own is not None:
                    found[child, nr] = joined(found.get((child, nr)), own)
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
        possible = candidates(shape, self._n)
        if fitting := [one for one in possible if _explains(labels, one, shape[one.axis], self._n)]:
            return Finding(fitting[0], len(fitting) == 1, tuple(fitting[1:]))
        return self._listed(labels, shape)

    def _listed(self, labels: Labels, shape: tuple[int, ...]) -> Finding:
        rows = joined_along(labels, range(1, len(shape))).reshape(-1)
        if (rows == SEVERAL).any():
            return Finding(Unplaced.SHARED_BY_SAMPLES)
        # A row without a gradient may belong to any sample.
        rows = np.broadcast_to(np.where(rows == NOBODY, 0, rows), shape[:1])
        return Finding(Placement(0, Layout.INDEXED, torch.from_numpy(rows.copy())))


def _of_inputs(at: At) -> list[Labels | None]:
    """The labels of the gradients of a node's inputs, also where it hides what it does."""
    if is_python_function(at.node):
        return [None if shape is None else _supposed(at, shape) for shape in at.inputs]
    if _hides(at.node):
        return [None if shape is None else of_all(at.labels, len(shape)) for shape in at.inputs]
    return labels_of_inputs(at)


def _supposed(at: At, shape: tuple[int, ...]) -> Labels | None:
    """The labels of an input of a function of Python's, if it has the samples on the same axis as an output of that size."""
    found = None
    for labels, whole in zip(at.labels, at.shapes, strict=True):
        if labels is None:
            continue
        along = [axis for axis in range(labels.ndim) if differ_along(labels, [axis])]
        axis = along[0] if len(along) == 1 else 0
        own = of_all([labels], len(shape))
        if shape[axis : axis + 1] == whole[axis : axis + 1] != () and (axis == 0 or len(shape) == len(whole)):
            rows = joined_along(labels, [other for other in range(labels.ndim) if other != axis])
            own = on_axis(rows.reshape(-1), axis, len(shape))
        found = joined(found, own)
    return found


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
    found = {node: list(own) for node in nodes if not _hides(node) and (own := indices_of(node)) is not None}
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
