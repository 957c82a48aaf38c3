"""The registry of label rules, and how a node's rule is applied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from torch_secorder.autograd.nodes import is_python_function
from torch_secorder.autograd.saved import knows, saved
from torch_secorder.batch_axis.labels import Labels, fits, of_all, summed_to

Shape = tuple[int, ...]
Answer = Sequence[Labels | None]


@dataclass(eq=False, slots=True)
class At:
    """A node that labels arrive at.

    Attributes:
        node: the node.
        kind: what its rule is registered under.
        labels: the labels of its outputs' gradients; None for a gradient that does not arrive.
        shapes: the shapes of its outputs.
        inputs: the shapes of its inputs; None for an input that needs no gradient.
        indices: the indices of :func:`indices_of`, or what the node was found to do by :func:`question_of`, on the host; None for
            an axis that is taken whole.
    """

    node: Any
    kind: str
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
Question = Callable[[Node], Sequence[Tensor] | None]  # None where the node is not called

# The kind of all nodes of Python functions, whatever they are called.
PYTHON_FUNCTION = "torch.autograd.Function"

# The kind of the nodes of writes into a part of a tensor.
COPY_SLICES = "torch::autograd::CopySlices"

# The kind of the nodes of entries that were put where a mask is true.
MASKED_SCATTER = "MaskedScatterBackward0"


@dataclass(frozen=True)
class Registered:
    """A rule and what it needs.

    Attributes:
        rule: the rule.
        reads: our names of what it reads of what the node saved.
        needs_first: the rule applies only where the first output's gradient arrives, and no other.
        asks: gives what calls of the node by itself tell, in place of indices, for nodes that show nothing; None for all others.
    """

    rule: Rule
    reads: tuple[str, ...]
    needs_first: bool
    asks: Question | None


RULES: dict[str, Registered] = {}


def rule(
    *kinds: str, reads: Sequence[str] = (), needs_first: bool = True, asks: Question | None = None
) -> Callable[[Rule], Rule]:
    """Registers a rule for these kinds of nodes, each of which has one rule only; see :class:`Registered`."""

    def register(function: Rule) -> Rule:
        assert RULES.keys().isdisjoint(kinds), f"A second rule for one of {kinds}."
        RULES.update(dict.fromkeys(kinds, Registered(function, tuple(reads), needs_first, asks)))
        return function

    return register


def backward(names: str, versions: Sequence[int] = (0, 1, 2)) -> list[str]:
    """The kinds of the nodes of functions with these names, in each of these versions."""
    return [f"{name}Backward{version}" for name in names.split() for version in versions]


def indices_of(node: Node, kind: str) -> Sequence[Tensor | None] | None:
    """The indices that a node of some kind saved and that its rule reads; None if the rule reads none."""
    if not reads_tensors(kind):
        return None
    reads = RULES[kind].reads
    if "indices" in reads and knows(kind, "indices"):
        return tuple(saved(node, "indices"))
    if "index" in reads and knows(kind, "index"):
        found = saved(node, "index")
        return (found,) if isinstance(found, Tensor) else None
    return None


def question_of(kind: str) -> Question | None:
    """How nodes of a kind are asked what they do, if their rule wants them to be called."""
    return RULES[kind].asks if kind in RULES else None


def settings_of(node: Node, kind: str) -> tuple[object, ...] | None:
    """What decides, besides labels and shapes, what a node of a kind without indices does with labels.

    It is None for a node that has to be asked.
    """
    found = RULES.get(kind)
    if found is None or not found.reads:
        return () if found is None or found.asks is None else None
    if found.asks is not None:
        return None
    return tuple([saved(node, name) for name in found.reads]) if knows(kind, *found.reads) else ()


def kind_of(node: Node) -> str:
    """What a node's rule is registered under."""
    return PYTHON_FUNCTION if is_python_function(node) else node.name()


def reads_tensors(kind: str) -> bool:
    """Whether the rule of a kind may read tensors that nodes saved."""
    return kind in RULES and not {"index", "indices"}.isdisjoint(RULES[kind].reads)


def labels_of_inputs(at: At, wanted: Sequence[int]) -> list[Labels | None]:
    """The labels of the gradients of some of a node's inputs, by their numbers; None for those that need none."""
    answer = _answer(at)
    found: list[Labels | None] = []
    for index in wanted:
        shape, own = at.inputs[index], None if answer is None else answer[index]
        if shape is None:
            found.append(None)
            continue
        if own is not None and not fits(own, shape):
            own = summed_to(own, shape) if own.ndim >= len(shape) else None
            own = own if own is not None and fits(own, shape) else None
        found.append(of_all(at.labels, len(shape)) if own is None else own)
    return found


def _answer(at: At) -> Answer | None:
    found = _applicable(at.kind)
    if found is None:
        return None
    only_first = at.labels[0] is not None and (len(at.labels) == 1 or all(one is None for one in at.labels[1:]))
    return found.rule(at) if only_first or not found.needs_first else None


def _applicable(kind: str) -> Registered | None:
    """The rule for a kind, if there is one and this torch's nodes show what it reads."""
    found = RULES.get(kind)
    return found if found is not None and knows(kind, *found.reads) else None
