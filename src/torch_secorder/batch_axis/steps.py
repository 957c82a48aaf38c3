"""Steps of a derivation: labels go through one node, to some of its inputs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch.autograd.graph import Node

from torch_secorder.autograd.nodes import may_have_packed_tensors
from torch_secorder.batch_axis.label_rules import PYTHON_FUNCTION, At, kind_of, labels_of_inputs, reads_tensors
from torch_secorder.batch_axis.label_rules.registry import settings_of
from torch_secorder.batch_axis.labels import Labels, differ_along, joined, joined_along, of_all, on_axis

Inputs = tuple[tuple[Node | None, int], ...]


@dataclass(eq=False, slots=True)
class Step:
    """A node on the way from the outputs, and the inputs to which labels have not been followed yet.

    Attributes:
        node: the node.
        kind: what its rule is registered under.
        inputs: where the gradients of its inputs go.
        left: the numbers of the inputs that nobody has asked for.
        is_packed: whether it has saved tensors that its rule reads and that are costly to read.
        is_new: whether labels have not been followed through it at all.
    """

    node: Node
    kind: str
    inputs: Inputs
    left: list[int]
    is_packed: bool
    is_new: bool = True

    @classmethod
    def of(cls, node: Node, inputs: Inputs, *, packs: bool) -> Step:
        """The step through a node, no input of which has been asked for."""
        kind = kind_of(node)
        is_packed = reads_tensors(kind) and may_have_packed_tensors(node, packs)
        return cls(node, kind, inputs, [*range(len(inputs))], is_packed)


class Answers:
    """What nodes do with labels. Nodes of one kind with the same settings do the same with the same labels.

    A model has most of its layers many times, so that few nodes need an answer of their own.
    """

    def __init__(self) -> None:
        # The labels are kept beside the answers, since the keys have their addresses.
        self._known: dict[Hashable, tuple[Sequence[Labels | None], list[Labels | None]]] = {}

    def labels_of_inputs(self, at: At, wanted: Sequence[int], step: Step) -> list[Labels | None]:
        """The labels of the gradients of some of a node's inputs, also where it hides what it does."""
        settings = None if step.is_packed or at.indices else settings_of(at.node, at.kind)
        if settings is None:
            return _of_inputs(at, wanted, step)
        key = (at.kind, settings, *map(id, at.labels), at.shapes, *at.inputs, *wanted)
        if (known := self._known.get(key)) is None:
            known = self._known[key] = at.labels, _of_inputs(at, wanted, step)
        return known[1]


def _of_inputs(at: At, wanted: Sequence[int], step: Step) -> list[Labels | None]:
    if step.is_packed:
        return [None if (shape := at.inputs[index]) is None else of_all(at.labels, len(shape)) for index in wanted]
    if at.kind == PYTHON_FUNCTION and not at.indices:
        return [None if (shape := at.inputs[index]) is None else _supposed(at, shape) for index in wanted]
    return labels_of_inputs(at, wanted)


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
