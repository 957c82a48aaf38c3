"""Graphs of gradients that the user's ignored passes with ``create_graph=True`` make; no later pass may go through them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from torch_secorder.autograd.engine import after_backward, current_node
from torch_secorder.autograd.second_derivatives import GradientGraphWatch
from torch_secorder.errors import UnsupportedError


class GradientGraphs:
    """Notices when a later pass goes through the graph of gradients that an ignored pass has made.

    Args:
        on_gradient: called with the gradients of a node in such a graph, in the later pass.
    """

    def __init__(self, on_gradient: Callable[[tuple[Tensor | None, ...]], None]):
        self._on_gradient = on_gradient
        self._watches: dict[int, GradientGraphWatch] = {}  # running ignored pass -> what watches its results

    def watch(self, task: int) -> None:
        """Watch what the running, ignored pass makes from the current node on, if that gets a graph."""
        if not torch.is_grad_enabled():
            return
        watch = self._watches.get(task)
        if watch is None:
            watch = self._watches[task] = GradientGraphWatch(self._on_gradient)
            after_backward(partial(self._leave, task))
        watch.watch_below(current_node())

    def _leave(self, task: int) -> None:
        if (watch := self._watches.pop(task, None)) is not None:
            watch.close()

    def close(self) -> None:
        """Stop watching all of them."""
        for watch in self._watches.values():
            watch.close()
        self._watches.clear()


def through_gradient_graph() -> UnsupportedError:
    """The refusal of a pass through such a graph."""
    return UnsupportedError(
        "the backward pass goes through the graph of a gradient (create_graph=True: a gradient penalty, forces, the "
        "residual of an equation), where parameters are used in ways that belong to no layer's call: differentiate such "
        "a loss outside of the monitor's block; the batch is left out"
    )
