"""The derivation: where tensors in one graph have their samples, from what its nodes saved, without a backward pass.

A router reorders rows in each step, so that placements behind it cannot be remembered. But its nodes have saved where each row
came from, and labels follow these indices from the outputs back to the inputs.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from torch_secorder.autograd.double_precision import together_on_host
from torch_secorder.autograd.graph_pass import calling_nodes
from torch_secorder.autograd.nodes import Edge, has_packed_tensors, is_python_function, output_shapes
from torch_secorder.autograd.route import Route
from torch_secorder.batch_axis.evidence import Finding, Unplaced, candidates
from torch_secorder.batch_axis.label_rules import (
    At,
    indices_of,
    kind_of,
    labels_of_inputs,
    may_be_called,
    question_of,
    reads_tensors,
)
from torch_secorder.batch_axis.labels import NOBODY, SEVERAL, Labels, joined, joined_along, reshaped
from torch_secorder.batch_axis.placement import Layout, Placement
from torch_secorder.batch_axis.search_pass import Viewed


@dataclass(eq=False, slots=True)
class _Step:
    """A node on the way from the outputs, and the inputs to which labels have not been followed yet.

    Attributes:
        node: the node.
        kind: what its rule is registered under.
        inputs: where the gradients of its inputs go.
        left: the numbers of the inputs that nobody has asked for.
    """

    node: Node
    kind: str
    inputs: tuple[tuple[Node | None, int], ...]
    left: list[int]


class Derivation:
    """The labels of gradients in one graph, followed from the outputs to wherever somebody asks for them.

    Args:
        placed: the model's outputs, and where each has its samples; an output without samples is left out.
        n: the number of samples.
        ends: the nodes where the graph ends.
        calls_functions: call Python functions to know what they do. If not, they hide it.
    """

    def __init__(
        self,
        placed: Sequence[tuple[Tensor, Placement | None]],
        n: int,
        ends: Iterable[Node],
        *,
        calls_functions: bool = True,
    ):
        self._calls_functions = calls_functions
        self._placed = [(x, where) for x, where in placed if where is not None]
        self._n, self._ends = n, list(ends)
        self._labels: dict[Edge, Labels | None] = {}
        self._steps: list[_Step] | None = None
        self._shapes: dict[Node, tuple[tuple[int, ...], ...]] = {}
        self._told: dict[Node, list[Tensor | None]] = {}
        self._hidden = False
        self._known: dict[Hashable, Finding] = {}

    @property
    def has_several_outputs(self) -> bool:
        """Whether several outputs have samples, so that one of them may compare the samples of another."""
        return len(self._placed) > 1

    def findings(self, wanted: Sequence[Viewed]) -> list[Finding] | None:
        """The findings from the labels at these edges, each viewed in its shape; None if nodes of the graph hide what they do."""
        labels = self.labels([edge for edge, _ in wanted])
        if labels is None:
            return None
        return [self._finding(own, edge, tuple(shape)) for own, (edge, shape) in zip(labels, wanted, strict=True)]

    def labels(self, edges: Sequence[GradientEdge]) -> list[Labels | None] | None:
        """The labels at these edges; None in the place of the whole list if nodes of the graph hide what they do."""
        if self._steps is None:
            self._steps = self._begun()
        if self._hidden:
            return None
        self._follow(self._steps, {edge.node for edge in edges})
        return [self._labels.get((edge.node, edge.output_nr)) for edge in edges]

    def _begun(self) -> list[_Step]:
        """The steps of the whole graph, each after those of all its consumers; and what is known of it before the first."""
        self._hidden = any(x.is_nested for x, _ in self._placed)
        if self._hidden:
            return []
        roots = [get_gradient_edge(x) for x, _ in self._placed]
        for edge, (x, where) in zip(roots, self._placed, strict=True):
            key = (edge.node, edge.output_nr)
            self._labels[key] = joined(self._labels.get(key), _of_output(x, where, self._n))
        route = Route([edge.node for edge in roots], self._ends)
        steps = [
            _Step(node, kind_of(node), inputs := node.next_functions, [*range(len(inputs))]) for node in route.order
        ]
        self._shapes = {step.node: _shapes(step.node) for step in steps}
        hidden = bool(route.hidden) or any(map(_hides, steps)) or any(map(_is_nested, self._shapes.values()))
        told = None if hidden else self._answers(steps)
        self._hidden = told is None
        self._told = _on_host(told or {})
        return steps

    def _follow(self, steps: Sequence[_Step], ends: Container[Node]) -> None:
        """Follow labels through these steps as far as it takes to know those that arrive at some nodes."""
        leads = set()
        for step in reversed(steps):
            if step.node in ends or any(child in leads for child, _ in step.inputs):
                leads.add(step.node)
        for step in steps:
            if step.node in leads and (wanted := [index for index in step.left if step.inputs[index][0] in leads]):
                step.left = [index for index in step.left if index not in wanted]
                self._take(step, wanted)

    def _take(self, step: _Step, wanted: Sequence[int]) -> None:
        """Follow labels through one step to some of its inputs."""
        known, node = self._shapes, step.node
        shapes = known[node]
        labels = [self._labels.get((node, nr)) for nr in range(len(shapes))]
        if labels[0] is None and all(one is None for one in labels):
            return
        inputs = [known[child][nr] if child in known else None for child, nr in step.inputs]
        at = At(node, step.kind, labels, shapes, inputs, self._told.get(node, ()))
        for index, own in zip(wanted, labels_of_inputs(at, wanted), strict=True):
            child, nr = step.inputs[index]
            assert child is not None
            self._labels[child, nr] = joined(self._labels.get((child, nr)), own)

    def _answers(self, steps: Sequence[_Step]) -> dict[Node, list[Tensor | None]] | None:
        """The indices that nodes saved, and what calls of those that show nothing tell; None if one of these may not be called.

        Hooks on saved tensors would run in a call, and torch does not show whether a node that writes a part has such tensors.
        """
        found = {step.node: list(own) for step in steps if (own := indices_of(step.node, step.kind)) is not None}
        questions = {step.node: asks for step in steps if (asks := question_of(step.kind)) is not None}
        functions = [node for node in questions if is_python_function(node)]
        if not questions or any(has_packed_tensors(step.node) is not False for step in steps):
            return None if functions else found
        if functions and not (self._calls_functions and all(map(may_be_called, functions))):
            return None
        with calling_nodes([x for x, _ in self._placed]), torch.no_grad():
            found |= {node: list(own) for node, asks in questions.items() if (own := asks(node)) is not None}
        return found if found.keys() >= set(functions) else None

    def _finding(self, labels: Labels | None, edge: GradientEdge, shape: tuple[int, ...]) -> Finding:
        """What labels say of a tensor in some shape; most layers of a model have the same labels, of which it is known then."""
        if labels is None or 0 in shape:
            return Finding(Unplaced.NO_GRADIENT)
        own = self._shapes[edge.node][edge.output_nr]
        key = (labels.shape, labels.tobytes(), own, shape)
        if (known := self._known.get(key)) is None:
            known = self._known[key] = self._found(reshaped(labels, own, shape), shape)
        return known

    def _found(self, labels: Labels, shape: tuple[int, ...]) -> Finding:
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


def _on_host(found: dict[Node, list[Tensor | None]]) -> dict[Node, list[Tensor | None]]:
    """What nodes told, on the host; what is on a device goes there in one copy, so that the host waits only once."""
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


def _is_nested(shapes: Iterable[tuple[int, ...]]) -> bool:
    """Whether some of these shapes are those of nested tensors, with a size that is no number."""
    return any(type(size) is not int for shape in shapes for size in shape)


def _hides(step: _Step) -> bool:
    """Whether a node has saved tensors that are costly to read, which its rule has to."""
    return reads_tensors(step.kind) and has_packed_tensors(step.node) is True
