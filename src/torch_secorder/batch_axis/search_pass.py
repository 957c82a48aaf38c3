"""The search pass: the library's own backward passes through a graph, with the samples marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from torch_secorder.autograd.engine import in_search_pass, search_pass
from torch_secorder.autograd.precision import has_half_precision
from torch_secorder.batch_axis.evidence import (
    MARKS_PER_PASS,
    MARKS_PER_PASS_OF_HALF,
    Evidence,
    Sketch,
    evidence,
    sample_marks,
)
from torch_secorder.errors import ShapeError, UnsupportedError
from torch_secorder.model.ranks import full_tensor

# Length of the repeated block of random numbers. It is prime, so that it can't line up with the period of an output's own layout.
SEED_PERIOD = 262_139
Viewed = tuple[GradientEdge, Sequence[int]]  # a place in the graph, and the shape in which its gradient is looked at
Sketches = list[Sketch | None]


class SearchPasses:
    """Backward passes from a model's outputs, one for each set of marks.

    Args:
        roots: the model's outputs.
        axis: where those have their samples; an output with another size there shows nothing.
        n: how many samples.
        common_count: from the number of passes that this graph needs to the number that is made. Ranks that search together
            agree on it here, when nothing is left to refuse: whoever has refused before doesn't come to the passes.
    """

    def __init__(
        self, roots: Sequence[Tensor], axis: int, n: int, common_count: Callable[[int], int] = lambda own: own
    ):
        self._roots = [x for x in roots if x.dim() > axis and x.shape[axis] == n]
        self._axis, self._n, self._common_count = axis, n, common_count
        self._marks_per_pass = MARKS_PER_PASS_OF_HALF if has_half_precision(*self._roots) else MARKS_PER_PASS

    def evidence(self, wanted: Sequence[Viewed]) -> list[Evidence]:
        """What the gradients at these edges, each seen in its shape, say of their samples.

        Raises:
            ShapeError: if no output has the samples.
            UnsupportedError: if re-entrant checkpointing hides the graph.
        """
        if not self._roots:
            raise ShapeError(
                f"where this model has its {self._n} samples can't be found out: it returns no differentiable tensor with as "
                f"many indices on axis {self._axis}; return the outputs along with the loss, or pass batch_axis="
            )
        marks = sample_marks(self._n, self._marks_per_pass)
        own = len(marks)
        sketches = self._sketches(wanted, marks + marks[:1] * (self._common_count(own) - own))
        columns = zip(*sketches[:own], strict=True)
        return [evidence(plain, marked, self._n, self._marks_per_pass) for plain, *marked in columns]

    def _sketches(self, wanted: Sequence[Viewed], marks: list[Tensor]) -> list[Sketches]:
        """For each set of marks a sketch of each wanted gradient; None where no gradient arrives."""
        ends = _deepest(self._roots, {edge.node for edge, _ in wanted})
        if not ends:
            return [[None] * len(wanted) for _ in marks]
        found: list[Sketches] = []
        asked = {place: edge for place, (edge, _) in enumerate(wanted) if edge.node in ends}
        with torch.enable_grad(), search_pass(self._roots) as roots, ExitStack() as hooks:
            for place, (edge, shape) in enumerate(wanted):
                if place not in asked:
                    hook = partial(_on_gradients, found, place, edge.output_nr, shape)
                    hooks.callback(edge.node.register_prehook(hook).remove)
            blocks = self._random_blocks()
            for mark in marks:
                found.append([None] * len(wanted))
                gradients = [self._marked(x, block, mark) for x, block in zip(self._roots, blocks, strict=True)]
                arrived = self._differentiated(roots, gradients, list(asked.values()))
                for place, grad in zip(asked, arrived, strict=True):
                    found[-1][place] = None if grad is None else _sketch(grad, wanted[place][1])
        return found

    def _differentiated(
        self, roots: list[Tensor], gradients: list[Tensor], edges: list[GradientEdge]
    ) -> Sequence[Tensor | None]:
        try:
            return torch.autograd.grad(roots, edges, gradients, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise UnsupportedError(
                f"the shapes in this model leave open where its {self._n} samples are, and re-entrant activation "
                "checkpointing hides it: use torch.utils.checkpoint with use_reentrant=False, or another batch size"
            ) from error

    def _random_blocks(self) -> list[Tensor]:
        """For each root the random numbers that its gradient repeats, the same in each pass."""
        generator = torch.Generator().manual_seed(0)
        sizes = [min(x.numel(), SEED_PERIOD) for x in self._roots]
        return [
            torch.randn(size, generator=generator).to(x.device, x.dtype)
            for x, size in zip(self._roots, sizes, strict=True)
        ]

    def _marked(self, root: Tensor, block: Tensor, mark: Tensor) -> Tensor:
        """A gradient for a root: the same random numbers in each pass, with each sample's part times its mark."""
        # A new one for each pass, since a node may change it in place. Those of all passes at once would be too much memory: an
        # output is sometimes as large as everything else.
        if not root.numel():
            return torch.zeros_like(root)
        gradient = block.repeat(-(-root.numel() // len(block)))[: root.numel()].view(root.shape)
        return gradient.mul_(mark.to(gradient).view(-1, *[1] * (root.dim() - 1 - self._axis)))


def _on_gradients(
    found: list[Sketches], place: int, nr: int, shape: Sequence[int], grads: Sequence[Tensor | None]
) -> None:
    """In a search pass, before a wanted node runs: sketch the gradient of one of its outputs."""
    if in_search_pass() and (grad := grads[nr]) is not None:
        found[-1][place] = _sketch(grad, shape)


def _sketch(grad: Tensor, shape: Sequence[int]) -> Sketch:
    return Sketch.of(full_tensor(grad).reshape(tuple(shape)))


def _deepest(roots: Sequence[Tensor], wanted: set[Node]) -> set[Node]:
    """The wanted nodes that lead to no other wanted one.

    A backward pass that is asked for the gradients of these goes through all wanted nodes.
    """
    leads: dict[Node, bool] = {}  # whether a node is wanted or leads to one that is
    ends: set[Node] = set()
    stack = [(x.grad_fn, False) for x in roots if x.grad_fn is not None]
    while stack:
        node, done = stack.pop()
        children = [child for child, _ in node.next_functions if child is not None]
        if done:
            below = any(leads.get(child, False) for child in children)
            leads[node] = below or node in wanted
            if node in wanted and not below:
                ends.add(node)
        elif node not in leads:
            leads[node] = False
            stack.append((node, True))
            stack += [(child, False) for child in children if child not in leads]
    return ends
