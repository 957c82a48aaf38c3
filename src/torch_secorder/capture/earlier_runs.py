"""The runs of the model before the present one, for graphs that lead from one run into another.

A policy that is called at every step of an episode, or a solver's correction, takes what its earlier call has computed. The
earlier run has found the uses of parameters in its own part of the graph, so that the later one ends where that part begins.
"""

from __future__ import annotations

from threading import local

from torch.autograd.graph import Node

from torch_secorder.autograd.roots import next_sequence_number, sequence_number

# How many runs are remembered, and how many nodes between them; one backward pass may go through an episode.
MOST = 2**14


class EarlierRuns(local):
    """The nodes that runs of the model in this thread have made, by their numbers.

    Nodes have no weak references, but the numbers of those that one thread has made are different. Each thread has runs of its
    own, and a later one that gets the name of a thread which is over counts from the beginning.

    Attributes:
        runs: for each run that is over the numbers of its nodes, from a first to below a last, in ascending order.
    """

    def __init__(self) -> None:
        self.runs: list[tuple[int, int]] = []
        self._first = 0
        self._uses: dict[int, None] = {}

    def begin(self) -> None:
        """Note that a run begins."""
        self._first = next_sequence_number()

    def is_first_use(self, node: Node) -> bool:
        """Whether no earlier run has met this use of a parameter, which may lie before several runs; it is noted."""
        number = sequence_number(node)
        if number >= self._first:  # as are those of the present run
            return True
        is_new = number not in self._uses
        self._uses[number] = None
        if len(self._uses) > MOST:
            del self._uses[next(iter(self._uses))]
        return is_new

    def end(self) -> None:
        """Note that the run is over, and that its uses of parameters are found."""
        last = next_sequence_number()
        if last > self._first:  # A run without gradients has made no node.
            del self.runs[: max(0, len(self.runs) + 1 - MOST)]
            self.runs.append((self._first, last))
