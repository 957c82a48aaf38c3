"""Evidence for where the tensors in a graph have their samples, from backward passes of our own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from torch_secorder.autograd.engine import in_search_pass, search_pass
from torch_secorder.autograd.nodes import output_shapes
from torch_secorder.batch_axis.evidence import BASE, BASE_OF_HALF, Evidence, Sketch, Unplaced, evidence, factors
from torch_secorder.batch_axis.knowledge import Key, Memory
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.errors import ShapeError, UnsupportedError
from torch_secorder.model.ranks import Ranks, whole

TILE = 262_139  # a prime: whatever else is periodic in a root has another period
Wanted = tuple[Key, GradientEdge, Sequence[int]]  # what to remember it by, where in the graph, the shape to see it in


class Look:
    """Evidence for nodes of one graph, remembered for later graphs of the same model.

    Attributes:
        outputs: as in :class:`Memory`.
        ahead: gives nodes that may be asked for later: if a backward pass is made, it looks at them too.

    Args:
        memory: what was found out before.
        roots: the model's outputs.
        axis: where those have their samples; others tell nothing.
        n: how many samples.
        rehearse: fills the memory from a cheaper graph of the same model, if there is a way.
        doubtful: whether shapes leave open where the samples are.
        ranks: those that look together, at the same places.
    """

    def __init__(
        self,
        memory: Memory,
        roots: list[Tensor],
        axis: int,
        n: int,
        rehearse: Callable[[], None] | None,
        doubtful: bool,
        ranks: Ranks,
    ):
        self._known, self.outputs, self._n, self._axis = memory.known, memory.outputs, n, axis
        memory.turns += 1
        # A gradient that was zero is asked for again, less and less often unless shapes leave open what its samples are.
        self._patient = not doubtful and memory.turns.bit_count() > 1
        self._rehearse, self._ranks = None if ranks.several else rehearse, ranks
        self._roots = [x for x in roots if x.shape[axis] == n]
        self._base = BASE_OF_HALF if any(x.dtype in (torch.float16, torch.bfloat16) for x in roots) else BASE
        self.ahead: Callable[[], Iterable[Node]] = list
        self._seen: dict[tuple[Node, int], Evidence] = {}

    def __call__(self, wanted: list[Wanted]) -> list[Evidence]:
        """Evidence for each (key, edge, shape); what was found for a key before holds while it fits the shape."""
        new = [item for item in wanted if not self._holds(item[0], item[2])]
        if self._ranks.several:
            return self._together(wanted, bool(new))
        if new and self._rehearse is not None:
            self._rehearse()
            new = [item for item in new if not self._holds(item[0], item[2])]
        self._find(new)
        return [self._known[key] for key, _, _ in wanted]

    def _together(self, wanted: list[Wanted], new: bool) -> list[Evidence]:
        """All ranks look at all of these, or none looks at any: a pass of one alone would wait for the others forever."""
        if not self._ranks.most(new):
            return [self._known[key] for key, _, _ in wanted]
        self._ranks.agreed(
            [key for key, _, _ in wanted],
            "their graphs leave different places open where the samples are; give all of them batches of one shape, or pass "
            "batch_axis=",
        )
        self._find(list(wanted))
        shared = self._ranks.most_each([self._known[key] is Unplaced.SHARED for key, _, _ in wanted])
        if self._n == 1:  # nothing tells one sample from all of them, but another rank's evidence
            self._known |= {key: Unplaced.SHARED for (key, _, _), found in zip(wanted, shared, strict=True) if found}
        return [self._known[key] for key, _, _ in wanted]

    def _find(self, new: list[Wanted]) -> None:
        looked_at = [item for item in new if item[0][0] == "use" and (item[1].node, item[1].output_nr) in self._seen]
        for key, edge, _ in looked_at:
            self._known[key] = self._seen[edge.node, edge.output_nr]
        new = [item for item in new if item not in looked_at]
        if new:
            ahead: list[Wanted] = [
                ((node, nr), GradientEdge(node, nr), shape)
                for node in self.ahead()
                for nr, shape in enumerate(output_shapes([node]))
            ]
            self.ahead = list
            columns = zip(*self._sketches([*new, *ahead]), strict=True)
            for (key, edge, _), (plain, *scaled) in zip([*new, *ahead], columns, strict=True):
                found = evidence(plain, scaled, self._n, self._base)
                if key == (edge.node, edge.output_nr):
                    self._seen[edge.node, edge.output_nr] = found
                else:
                    self._known[key] = found

    def _holds(self, key: Key, shape: Sequence[int]) -> bool:
        known = self._known.get(key)
        if isinstance(known, Placement):
            # A list is never remembered: a router decides anew for each batch.
            return known.listed is None and known.fits(shape, self._n)
        # (A call keeps its placement from its shape meanwhile; a use has none.)
        return known is Unplaced.SHARED or (known is Unplaced.NOTHING and self._patient and key[0] == "call")

    def _sketches(self, wanted: list[Wanted]) -> list[list[Sketch | None]]:
        """For each set of factors for the samples, sketches of the gradients at the wanted edges in the wanted shapes."""
        if not self._roots:
            raise ShapeError(
                f"where this model has its {self._n} samples can't be found out: it returns no differentiable tensor with as "
                f"many indices on axis {self._axis}; return the outputs along with the loss, or pass batch_axis="
            )
        generator = torch.Generator().manual_seed(0)
        tiles = [torch.randn(min(x.numel(), TILE), generator=generator).to(x.device, x.dtype) for x in self._roots]
        found: list[list[Sketch | None]] = []
        ends = _deepest(self._roots, {edge.node for _, edge, _ in wanted})
        with torch.enable_grad(), search_pass(self._roots) as roots, ExitStack() as hooks:
            for position, (_, edge, shape) in enumerate(wanted):
                if edge.node not in ends:
                    hook = partial(_arrived, found, position, edge.output_nr, tuple(shape))
                    hooks.callback(edge.node.register_prehook(hook).remove)
            if not ends:
                return [[None] * len(wanted) for _ in factors(self._n, self._base)]
            last = [(position, item) for position, item in enumerate(wanted) if item[1].node in ends]
            for factor in self._factors():
                seeds = [self._seed(x, tile, factor) for x, tile in zip(self._roots, tiles, strict=True)]
                found.append([None] * len(wanted))
                try:
                    edges = [edge for _, (_, edge, _) in last]
                    grads = torch.autograd.grad(roots, edges, seeds, retain_graph=True, allow_unused=True)
                except RuntimeError as error:
                    if "use_reentrant" not in str(error):
                        raise
                    raise UnsupportedError(
                        f"the shapes in this model leave open where its {self._n} samples are, and re-entrant activation "
                        "checkpointing hides it: use torch.utils.checkpoint with use_reentrant=False, or another batch size"
                    ) from error
                for grad, (position, (_, _, shape)) in zip(grads, last, strict=True):
                    found[-1][position] = None if grad is None else Sketch.of(whole(grad).reshape(tuple(shape)))
        return found[: len(factors(self._n, self._base))]

    def _seed(self, root: Tensor, tile: Tensor, factor: Tensor) -> Tensor:
        """A gradient for a root: the same numbers in each pass, times a factor for each sample."""
        # Made anew, since a backward may change it in place; and never two at once, for some are as large as all else.
        if not root.numel():
            return torch.zeros_like(root)
        seed = tile.repeat(-(-root.numel() // len(tile)))[: root.numel()].view(root.shape)
        return seed.mul_(factor.to(seed).view(-1, *[1] * (root.dim() - 1 - self._axis)))

    def _factors(self) -> list[Tensor]:
        """The factors, and more of them as long as other ranks need more."""
        own = factors(self._n, self._base)
        return own + own[:1] * (self._ranks.most(len(own)) - len(own))


def _arrived(
    found: list[list[Sketch | None]], position: int, nr: int, shape: tuple[int, ...], grads: Sequence[Tensor | None]
) -> None:
    """A gradient on its way, in the latest pass."""
    if in_search_pass() and (grad := grads[nr]) is not None:
        found[-1][position] = Sketch.of(whole(grad).reshape(shape))


def _deepest(roots: Sequence[Tensor], wanted: set[Node]) -> set[Node]:
    """The wanted nodes that lead to no other: what a backward pass has to be asked for, to go through all of them."""
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
