"""The registry of label rules, and how a node's rule is applied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from torch_secorder.autograd.saved import knows, saved
from torch_secorder.batch_axis.labels import Labels, fits, of_all, summed_to

Shape = tuple[int, ...]
Answer = Sequence[Labels | None]


@dataclass(frozen=True, eq=False)
class At:
    """A node that labels arrive at.

    Attributes:
        node: the node.
        labels: the labels of its outputs' gradients; None for a gradient that does not arrive.
        shapes: the shapes of its outputs.
        inputs: the shapes of its inputs; None for an input that needs no gradient.
        indices: the indices of :func:`indices_of`, on the host; None for an axis that is taken whole.
    """

    node: Any
    labels: Sequence[Labels | None]
    shapes: Sequence[Shape]
    inputs: Sequence[Shape | None]
    indices: Sequence[Tensor | None] = ()

    @property
    def first(self) -> Labels:
        """The labels of the first output's gradient, which has arrived."""
        assert self.labels[0] is not None
        return self.labels[0]

    def axis(self, shape: Sequence[int]) -> int:
        """The axis that the node works along, of a tensor of this shape."""
        axis: int = saved(self.node, "axis")
        return axis % len(shape)

    def axes(self, shape: Sequence[int]) -> list[int]:
        """The axes that the node works along; all axes if it names none."""
        return sorted({axis % len(shape) for axis in saved(self.node, "axes") or range(len(shape))})


Rule = Callable[[At], Answer | None]  # None where it does not apply


@dataclass(frozen=True)
class Registered:
    """A rule and what it needs.

    Attributes:
        rule: the rule.
        reads: our names of what it reads of what the node saved.
        needs_first: the rule applies only where the first output's gradient arrives, and no other.
    """

    rule: Rule
    reads: tuple[str, ...]
    needs_first: bool


RULES: dict[str, Registered] = {}


def rule(*kinds: str, reads: Sequence[str] = (), needs_first: bool = True) -> Callable[[Rule], Rule]:
    """Registers a rule for these kinds of nodes, each of which has one rule only; see :class:`Registered`."""

    def register(function: Rule) -> Rule:
        assert RULES.keys().isdisjoint(kinds), f"A second rule for one of {kinds}."
        RULES.update(dict.fromkeys(kinds, Registered(function, tuple(reads), needs_first)))
        return function

    return register


def backward(names: str, versions: Sequence[int] = (0, 1, 2)) -> list[str]:
    """The kinds of the nodes of functions with these names, in each of these versions."""
    return [f"{name}Backward{version}" for name in names.split() for version in versions]


def indices_of(node: Node) -> Sequence[Tensor | None] | None:
    """The indices that a node saved and that its rule reads; None if the rule reads none."""
    kind = node.name()
    reads = _reads(kind)
    if "indices" in reads and knows(kind, "indices"):
        return tuple(saved(node, "indices"))
    if "index" in reads and knows(kind, "index"):
        found = saved(node, "index")
        return (found,) if isinstance(found, Tensor) else None
    return None


def reads_tensors(node: Node) -> bool:
    """Whether a node's rule may read tensors that it saved."""
    return not {"index", "indices"}.isdisjoint(_reads(node.name()))


def _reads(kind: str) -> tuple[str, ...]:
    return RULES[kind].reads if kind in RULES else ()


def labels_of_inputs(at: At) -> list[Labels | None]:
    """The labels of the gradients of a node's inputs; None for those that need none."""
    answer = _answer(at)
    found: list[Labels | None] = []
    for index, shape in enumerate(at.inputs):
        own = None if shape is None or answer is None else answer[index]
        if shape is not None and own is not None and own.ndim >= len(shape):
            own = summed_to(own, shape)
        if shape is not None and (own is None or not fits(own, shape)):
            own = of_all(at.labels, len(shape))
        found.append(own)
    return found


def _answer(at: At) -> Answer | None:
    kind = at.node.name()
    found = RULES.get(kind)
    if found is None or not knows(kind, *found.reads):
        return None
    only_first = at.labels[0] is not None and all(one is None for one in at.labels[1:])
    return found.rule(at) if only_first or not found.needs_first else None
