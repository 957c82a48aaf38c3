"""Parameters that are not analyzed: they are frozen during an analysis, unless the graph of the analyzed ones needs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from torch_secorder.autograd.random_state import forked_random
from torch_secorder.errors import CoverageError
from torch_secorder.model.parameters import ParameterTable

T = TypeVar("T")


class FrozenOthers:
    """Which parameters are frozen during an analysis, to compute less.

    Freezing can cut analyzed parameters off the graph: re-entrant checkpointing gives parameters a gradient only if one of its
    inputs has one, and models may look at ``requires_grad`` themselves. So if some analyzed parameter is not reached, the batch
    runs again with nothing frozen, once for each kind of graph.

    Args:
        table: the analyzed parameters of a model.
        allowed: whether any may be frozen.
    """

    def __init__(self, table: ParameterTable, *, allowed: bool):
        self._table, self._allowed = table, allowed
        self._whole: set[int] = set()  # Fingerprints of graphs that freezing does not cut.

    def parameters(self) -> list[Tensor]:
        """The parameters that are frozen."""
        return self._table.others if self._allowed else []

    def without_cuts(self, analyze: Callable[[], T], reached: Callable[[T], set[int]], kind: Callable[[], int]) -> T:
        """The result of ``analyze``, with nothing frozen if freezing takes gradients from analyzed parameters.

        Args:
            analyze: runs the batch.
            reached: the positions of the parameters that the pass reached.
            kind: the fingerprint of the latest graph.
        """
        if not any(p.requires_grad for p in self.parameters()):
            return analyze()
        try:
            found = analyze()
            before, graph = reached(found), kind()
            if len(before) == len(self._table) or graph in self._whole:
                return found
        except CoverageError:  # Perhaps no analyzed parameter is reached.
            self._allowed = False
            with forked_random(self._table.tensors):
                return analyze()
        self._allowed = False
        with forked_random(self._table.tensors):
            again = analyze()
        if reached(again) != before:
            return again
        self._allowed = True
        self._whole.add(graph)
        return found
