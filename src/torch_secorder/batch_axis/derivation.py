"""The derivation: where tensors in one graph have their samples, from what its nodes saved, without a backward pass.

Labels follow the nodes from the outputs back to the inputs. What they say of a tensor follows from the kinds and shapes of the
nodes, and from the settings and indices of those that move samples: in another graph with the same, the samples are at the same
places. What passes show beyond that depends on numbers, such as those of a mask, and may be otherwise in the next batch. A router
reorders rows in each step, so that placements behind it cannot be remembered, and labels are what tells them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from torch_secorder.autograd.double_precision import together_on_host
from torch_secorder.autograd.graph_pass import calling_nodes
from torch_secorder.autograd.nodes import Edge, has_packed_tensors, is_python_function, output_shapes
from torch_secorder.autograd.route import Route
from torch_secorder.batch_axis.evidence import Finding, Unplaced
from torch_secorder.batch_axis.label_rules import (
    PYTHON_FUNCTION,
    At,
    indices_of,
    may_be_called,
    question_of,
    reads_tensors,
)
from torch_secorder.batch_axis.labels import Labels, joined, reshaped
from torch_secorder.batch_axis.moving import Mover, mover
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.batch_axis.readings import labels_of, what_labels_say, without_contradicted
from torch_secorder.batch_axis.search_pass import Viewed
from torch_secorder.batch_axis.steps import Answers, Step


class Derivation:
    """The labels of gradients in one graph, followed from the outputs to wherever somebody asks for them.

    Args:
        placed: the model's outputs, and where each has its samples; an output without samples is left out.
        n: the number of samples.
        ends: the nodes where the graph ends.
        calls_functions: call Python functions to know what they do. If not, they hide it.
        packs: whether nodes are supposed to have their saved tensors with hooks where torch does not show it.
    """

    def __init__(
        self,
        placed: Sequence[tuple[Tensor, Placement | None]],
        n: int,
        ends: Iterable[Node],
        *,
        calls_functions: bool = True,
        packs: bool = False,
    ):
        self._calls_functions, self._packs = calls_functions, packs
        self._placed = [(x, where) for x, where in placed if where is not None]
        self._n, self._ends = n, list(ends)
        self._labels: dict[Edge, Labels | None] = {}
        self._told: dict[Node, list[Tensor | None]] = {}
        self._movers: list[Mover] = []
        self._is_unasked = False
        self._followed: set[Node] = set()  # where all labels that arrive are known
        self._answers = Answers()
        self._known: dict[Hashable, tuple[Labels, Finding]] = {}  # the labels of an edge, and what they say

    @property
    def has_several_outputs(self) -> bool:
        """Whether several outputs have samples, so that one of them may compare the samples of another."""
        return len(self._placed) > 1

    @property
    def tells(self) -> bool:
        """Whether there are labels; there are none of nested tensors."""
        return not self._is_nested

    @property
    def has_functions(self) -> bool:
        """Whether Python functions are on the way."""
        return any(step.kind == PYTHON_FUNCTION for step in self._steps)

    @property
    def has_unasked_functions(self) -> bool:
        """Whether Python functions that may be called were not, since hooks keep saved tensors, or torch does not show it."""
        return bool(self._steps) and self._is_unasked

    @property
    def movers(self) -> list[Mover]:
        """The nodes whose settings or indices decide where samples are."""
        if not self._is_nested:
            self._follow(set(self._ends))
        return self._movers

    def findings(self, wanted: Sequence[Viewed]) -> list[Finding] | None:
        """The findings from the labels at these edges, each viewed in its shape; None if nodes of the graph hide what they do."""
        return None if self._hides else self.suppositions(wanted)

    def suppositions(self, wanted: Sequence[Viewed]) -> list[Finding] | None:
        """The same where Python functions that hide what they do are supposed to leave samples where they are.

        Passes have to confirm that. The result is None if some tensor in the graph is nested.
        """
        if self._is_nested:
            return None
        labels = self.labels([edge for edge, _ in wanted])
        return [self._finding(own, edge, tuple(shape)) for own, (edge, shape) in zip(labels, wanted, strict=True)]

    def without_contradicted(self, wanted: Sequence[Viewed], found: Sequence[Finding]) -> list[Finding]:
        """What passes found at these edges, without what labels exclude. They exclude nothing if nodes hide what they do."""
        if self._hides:
            return list(found)
        labels = self.labels([edge for edge, _ in wanted])
        return [
            one
            if own is None or 0 in shape
            else without_contradicted(one, self._viewed(own, edge, shape), tuple(shape), self._n)
            for own, one, (edge, shape) in zip(labels, found, wanted, strict=True)
        ]

    def labels(self, edges: Sequence[GradientEdge]) -> list[Labels | None]:
        """The labels at these edges."""
        self._follow({edge.node for edge in edges})
        return [self._labels.get((edge.node, edge.output_nr)) for edge in edges]

    @cached_property
    def _hides(self) -> bool:
        """Whether labels rest on what is supposed of nodes, or say too little of them."""
        steps = self._steps  # first, since it is followed by what nodes told
        unknown = any(
            step.is_packed or (step.kind == PYTHON_FUNCTION and step.node not in self._told) for step in steps
        )
        return unknown or self._is_nested

    @cached_property
    def _route(self) -> Route:
        """The way of the labels, which goes on behind functions that must not be called."""
        return Route([get_gradient_edge(x).node for x, _ in self._placed], self._ends, passes_opaque=True)

    @cached_property
    def _shapes(self) -> dict[Node, tuple[tuple[int, ...], ...]]:
        inputs = self._route.inputs
        return {node: output_shapes((node,)) if inputs[node] else _shapes(node) for node in self._route.order}

    @cached_property
    def _is_nested(self) -> bool:
        if any(x.is_nested for x, _ in self._placed):
            return True
        sizes = chain.from_iterable(chain.from_iterable(self._shapes.values()))
        return not set(map(type, sizes)) <= {int}  # A nested tensor has a size that is no number.

    @cached_property
    def _steps(self) -> list[Step]:
        """The steps of the whole graph, each after those of all its consumers; what is known before the first is noted."""
        for x, where in self._placed:
            edge = get_gradient_edge(x)
            key = (edge.node, edge.output_nr)
            self._labels[key] = joined(self._labels.get(key), labels_of(where, x.shape, self._n))
        steps = [Step.of(node, self._route.inputs[node], packs=self._packs) for node in self._route.order]
        self._told = _on_host(self._indices(steps))
        return steps

    def _follow(self, ends: set[Node]) -> None:
        """Follow labels as far as it takes to know those that arrive at some nodes."""
        leads = ends - self._followed
        if not leads:
            return
        self._followed |= leads
        found: list[tuple[Step, list[int]]] = []
        # The first search of a model does this for each node, so that it is no function of its own. A step through which labels
        # were followed once has all of them, and nothing before it is left.
        for step in reversed(self._steps):
            if step.left and (wanted := [index for index in step.left if step.inputs[index][0] in leads]):
                leads.add(step.node)
                found.append((step, wanted))
        for step, wanted in reversed(found):
            step.left = [index for index in step.left if index not in wanted]
            self._take(step, wanted)

    def _take(self, step: Step, wanted: Sequence[int]) -> None:
        """Follow labels through one step to some of its inputs."""
        known, node = self._shapes, step.node
        shapes = known[node]
        labels = [self._labels.get((node, nr)) for nr in range(len(shapes))]
        if labels[0] is None and all(one is None for one in labels):
            return
        inputs = [known[child][nr] if child in known else None for child, nr in step.inputs]
        at = At(node, step.kind, labels, shapes, inputs, self._told.get(node, ()))
        if step.is_new and (moving := mover(at, self._n)) is not None:
            self._movers.append(moving)
        step.is_new = False
        for index, own in zip(wanted, self._answers.labels_of_inputs(at, wanted, step), strict=True):
            child, nr = step.inputs[index]
            assert child is not None
            self._labels[child, nr] = joined(self._labels.get((child, nr)), own)

    def _indices(self, steps: Sequence[Step]) -> dict[Node, list[Tensor | None]]:
        """The indices that nodes saved, and what calls of those that show nothing tell.

        Hooks on saved tensors would run in a call, and torch does not show whether a node that writes a part has such tensors.
        """
        kinds = {step.kind for step in steps}
        reading, asked = set(filter(reads_tensors, kinds)), {kind: question_of(kind) for kind in kinds}
        readable = [step for step in steps if step.kind in reading and not step.is_packed]
        found = {step.node: list(own) for step in readable if (own := indices_of(step.node, step.kind)) is not None}
        questions = {
            step.node: asks
            for step in steps
            if (asks := asked[step.kind]) is not None
            and (step.kind != PYTHON_FUNCTION or (self._calls_functions and may_be_called(step.node)))
        }
        if not questions:
            return found
        if not all(has_packed_tensors(step.node) is False for step in steps):
            self._is_unasked = any(map(is_python_function, questions))
            return found
        with calling_nodes([x for x, _ in self._placed]), torch.no_grad():
            return found | {node: list(own) for node, asks in questions.items() if (own := asks(node)) is not None}

    def _finding(self, labels: Labels | None, edge: GradientEdge, shape: tuple[int, ...]) -> Finding:
        """What labels say of a tensor in some shape; most layers of a model have the same labels, of which it is known then."""
        if labels is None and edge.node not in self._route.inputs:
            return Finding(Unplaced.NOT_REACHED)
        if labels is None or 0 in shape:
            return Finding(Unplaced.NO_GRADIENT)
        own = self._shape_of(edge)
        # The bytes themselves would be as large as all labels of the graph together, which are kept anyway.
        key = (labels.shape, hash(labels.tobytes()), own, shape)
        known = self._known.get(key)
        if known is None or not (known[0] is labels or np.array_equal(known[0], labels)):
            known = self._known[key] = labels, what_labels_say(reshaped(labels, own, shape), shape, self._n)
        return known[1]

    def _viewed(self, labels: Labels, edge: GradientEdge, shape: Sequence[int]) -> Labels:
        return reshaped(labels, self._shape_of(edge), shape)

    def _shape_of(self, edge: GradientEdge) -> tuple[int, ...]:
        # An output may be behind a node that hides what it does, and then it is not on the route.
        return (self._shapes.get(edge.node) or _shapes(edge.node))[edge.output_nr]


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
