"""Where the graph of a run of the model leads into what earlier runs have made."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from torch_secorder.autograd.roots import sequence_number


def nodes_of_runs(roots: Sequence[Tensor], runs: Sequence[tuple[int, int]]) -> set[Node]:
    """The first nodes of some runs that a walk from the roots meets.

    Args:
        roots: the model's outputs.
        runs: for each run the numbers of its nodes, from a first to below a last, in ascending order.
    """
    found: set[Node] = set()
    if not runs:
        return found
    last = runs[-1][1]
    stack: list[Any] = [x.grad_fn for x in roots if x.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        number = sequence_number(node)
        if number < last:
            before = bisect_right(runs, (number, last)) - 1
            if before >= 0 and number < runs[before][1]:
                found.add(node)
                continue
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    return found
