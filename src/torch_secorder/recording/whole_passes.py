"""Whether a backward pass computes the gradients of all analyzed parameters that its loss depends on.

A pass that is asked for only some gradients (``backward(inputs=...)``, ``torch.autograd.grad``) skips whatever these do not need.
It reaches other parameters in only a part of their uses, or not at all, so their numbers would be too small.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch.autograd.graph import Node

from torch_secorder.autograd.engine import computes_gradient_of
from torch_secorder.autograd.roots import roots_of_pass
from torch_secorder.batch_axis.knowledge import KindSchedule
from torch_secorder.errors import CoverageError
from torch_secorder.recording.passes import below

SHOWN = 8  # parameters in an error's text


class WholePasses:
    """Checks the passes that left some parameters without a gradient.

    Args:
        names: the names of all parameters.
        leaves: the nodes that accumulate gradients of analyzed parameters -> the parameters' positions.

    Attributes:
        leaves: the same.
    """

    def __init__(self, names: Sequence[str], leaves: Mapping[Node, int]):
        self._names, self.leaves = names, leaves
        self._schedule = KindSchedule()  # of graphs in which the same parameters got a gradient

    def refusal(self, kind: int, positions: Sequence[int]) -> CoverageError | None:
        """The reason why the pass under way, which left some parameters without a gradient, cannot be counted; None if it can.

        Args:
            kind: a hash of its graph, that of the loss included.
            positions: the parameters that got a gradient.
        """
        if not self._schedule.due(hash((kind, tuple(sorted(positions))))):
            return None
        missed = sorted(set(self._missed()))
        if not missed:
            return None
        self._schedule.restart()  # The next such pass is looked at, too.
        names = ", ".join([*(self._names[position] for position in missed[:SHOWN]), *["..."][: len(missed) > SHOWN]])
        return CoverageError(
            f"the backward pass computes no gradient of {names}, on which the loss depends (it was asked for those of some "
            "parameters, by backward(inputs=...) or torch.autograd.grad): make a monitor with parameters= the names of those "
            "that it computes, or differentiate the loss for all of them; the batch is left out"
        )

    def _missed(self) -> Iterator[int]:
        """The positions of the parameters on which the losses depend, and whose gradients the pass does not compute."""
        for root in roots_of_pass():
            for node in below(root):
                if node in self.leaves and not computes_gradient_of(node):
                    yield self.leaves[node]
