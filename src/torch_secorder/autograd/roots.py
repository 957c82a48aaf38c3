"""Where the backward pass under way began: at losses, which no gradient that arrives further down shows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import methodcaller
from threading import current_thread, main_thread
from types import FrameType

from torch import Tensor, autograd
from torch._C._autograd import _get_sequence_nr
from torch.autograd.graph import GradientEdge, Node

from torch_secorder.autograd.engine import computes_gradient_of, current_graph_task
from torch_secorder.autograd.nodes import made_by
from torch_secorder.autograd.saved import knows, saved

# The functions of torch in which a user's program waits for a backward pass, and their argument that says where it begins.
_BEGINS_AT = {autograd.backward.__code__: "tensors", autograd.grad.__code__: "outputs"}

# The number of each node that accumulates the gradient of a leaf.
LEAF = 2**64 - 1

# How torch counts the ways in which a loss combines the numbers that it makes.
_REDUCTIONS = {1: "mean", 2: "sum"}

# The number of a node, which no other node has that the same thread has made. Nodes themselves have no weak references.
sequence_number: Callable[[Node], int] = methodcaller("_sequence_nr")

# The number that this thread's next node will have.
next_sequence_number: Callable[[], int] = _get_sequence_nr


def leads_to_older(root: Tensor, number: int) -> bool:
    """Whether the graph of a tensor has nodes that were made before the one with this number (:data:`next_sequence_number`).

    They belong to a graph of the user's then, as where several calls take weights that were computed once. Each thread numbers
    its own nodes from 0 on, so that in another thread than the first, which has made few, numbers say nothing.
    """
    if current_thread() is not main_thread():
        return True
    waiting = [node for node in (root.grad_fn,) if node is not None]
    seen, numbers, end = set(waiting), set[int](), next_sequence_number()
    while waiting:  # Every analysis does this, so that no Python function is called for a node.
        node = waiting.pop()
        own = node._sequence_nr()
        # Those of leaves are the largest that there is; those of another thread's nodes may be any.
        if own < number or own in numbers or end <= own < LEAF:
            return True
        if own < LEAF:
            numbers.add(own)
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                waiting.append(child)
    return False


def roots_of_pass() -> list[Node]:
    """The nodes at which the backward pass under way began; none outside of any pass, and for one that began in another way.

    Hooks run below the call of torch.autograd that began their pass, or in a thread of their device while that call waits.
    """
    if current_graph_task() < 0:
        return []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code in _BEGINS_AT:
            return _roots(frame)
        frame = frame.f_back
    return _roots_in_other_threads()


def _roots_in_other_threads() -> list[Node]:
    """The same in a thread of a device. Several threads may wait for passes, of which this one makes one."""
    frame: FrameType | None
    for frame in sys._current_frames().values():
        while frame is not None:
            # The engine does not count a root among the nodes that it executes, but what follows it.
            if frame.f_code in _BEGINS_AT and any(map(computes_gradient_of, _children(roots := _roots(frame)))):
                return roots
            frame = frame.f_back
    return []


def _children(nodes: Sequence[Node]) -> list[Node]:
    return [child for node in nodes for child, _ in node.next_functions if child is not None]


def _roots(frame: FrameType) -> list[Node]:
    """The nodes at which a call of torch.autograd begins its pass."""
    roots = frame.f_locals[_BEGINS_AT[frame.f_code]]
    found: list[Node] = []
    # Both functions take a sequence, but an edge, which is a tuple, is one root.
    several = not isinstance(roots, (Tensor, GradientEdge)) and isinstance(roots, Iterable)
    for root in roots if several else (roots,):
        if isinstance(root, GradientEdge):
            found.append(root.node)
        elif isinstance(root, Tensor) and root.requires_grad:
            found.append(root.grad_fn or made_by(root))
    return found


def reduction_of_loss() -> str | None:
    """How the loss at which the backward pass under way began combines its samples: "mean" or "sum".

    Returns:
        None where the pass began at anything but one of torch's own losses, such as at one that is divided or added to another.
    """
    roots = roots_of_pass()
    if len(roots) != 1 or not knows(roots[0].name(), "reduction"):
        return None
    return _REDUCTIONS.get(saved(roots[0], "reduction"))


def kind_of_loss(outputs: Mapping[int, int], leaves: Mapping[Node, int]) -> int:
    """A hash of what the loss of the pass under way does with a model's outputs, and of what it reaches beside them.

    It is that of the set of the names of the nodes between the two, of the outputs' numbers and of the parameters' positions. A
    loss that has a term for each object in its batch has the same set for all batches.

    Args:
        outputs: the numbers of the nodes that made the outputs (:data:`sequence_number`) -> which output it is.
        leaves: the nodes that accumulate gradients of parameters -> the parameters' positions.
    """
    waiting = roots_of_pass()
    seen, found = set(waiting), set[object]()
    while waiting:  # Every step does this, so that no Python function is called for a node.
        node = waiting.pop()
        if (output := outputs.get(sequence_number(node))) is not None:
            found.add(output)
            continue
        found.add(node.name())
        if (position := leaves.get(node)) is not None:
            found.add(("parameter", position))
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                waiting.append(child)
    return hash(frozenset(found))
