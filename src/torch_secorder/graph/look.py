"""Evidence for where the tensors in a graph have their samples, from backward passes of our own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from torch_secorder.capture import probe
from torch_secorder.errors import ShapeError, UnsupportedError
from torch_secorder.placement import Evidence, Placement, Unplaced, evidence, factors

Key = tuple[object, ...]
Wanted = tuple[Key, GradientEdge, Sequence[int]]  # what to remember it by, where in the graph, the shape to see it in


@dataclass(eq=False)
class Memory:
    """What was found out about one model.

    Attributes:
        known: the evidence for each place that was looked at.
        outputs: for nodes with several outputs, which one tells.
        warned: whether somebody was warned of slow rules.
        turns: how many graphs were looked at.
        others: the memory of each structure of graph, for the memory of a model.
    """

    known: dict[Key, Evidence] = field(default_factory=dict)
    outputs: dict[Key, int] = field(default_factory=dict)
    warned: bool = False
    turns: int = 0
    others: dict[int, Memory] = field(default_factory=dict)

    def of(self, structure: int) -> Memory:
        """What was found out about graphs of this structure: a model may change its way, and its samples their axis."""
        if len(self.others) > 64:  # of a model that never makes the same graph twice nothing is worth keeping
            self.others.clear()
        return self.others.setdefault(structure, Memory())


class Look:
    """Evidence for nodes of one graph, remembered for later graphs of the same model.

    Attributes:
        outputs: as in :class:`Memory`.

    Args:
        memory: what was found out before.
        roots: the model's outputs.
        axis: where those have their samples; others tell nothing.
        n: how many samples.
        rehearse: fills the memory from a cheaper graph of the same model, if there is a way.
        doubtful: whether shapes leave open where the samples are.
    """

    def __init__(
        self,
        memory: Memory,
        roots: list[Tensor],
        axis: int,
        n: int,
        rehearse: Callable[[], None] | None,
        doubtful: bool,
    ):
        self._known, self.outputs, self._n, self._axis = memory.known, memory.outputs, n, axis
        memory.turns += 1
        # A gradient that was zero is asked for again, less and less often unless shapes leave open what its samples are.
        self._patient = not doubtful and memory.turns.bit_count() > 1
        self._rehearse = rehearse
        self._roots = [x for x in roots if x.shape[axis] == n]

    def __call__(self, wanted: list[Wanted]) -> list[Evidence]:
        """Evidence for each (key, edge, shape); what was found for a key before holds while it fits the shape."""
        new = [item for item in wanted if not self._holds(item[0], item[2])]
        if new and self._rehearse is not None:
            self._rehearse()
            new = [item for item in new if not self._holds(item[0], item[2])]
        if new:
            columns = zip(*self._gradients(new), strict=True)
            for (key, _, _), (plain, *scaled) in zip(new, columns, strict=True):
                self._known[key] = evidence(plain, scaled, self._n)
        return [self._known[key] for key, _, _ in wanted]

    def _holds(self, key: Key, shape: Sequence[int]) -> bool:
        known = self._known.get(key)
        if isinstance(known, Placement):
            # A list is never remembered: a router decides anew for each batch.
            return known.listed is None and known.fits(shape, self._n)
        # (A call keeps its placement from its shape meanwhile; a use has none.)
        return known is Unplaced.SHARED or (known is Unplaced.NOTHING and self._patient and key[0] == "call")

    def _gradients(self, wanted: list[Wanted]) -> list[list[Tensor | None]]:
        """For each set of factors for the samples, the gradients at the wanted edges in the wanted shapes."""
        if not self._roots:
            raise ShapeError(
                f"where this model has its {self._n} samples can't be found out: it returns no differentiable tensor with as "
                f"many indices on axis {self._axis}; return the outputs along with the loss, or pass batch_axis="
            )
        found = []
        generator = torch.Generator().manual_seed(0)
        seeds = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in self._roots]
        with torch.enable_grad(), probe(self._roots) as roots:
            edges = [edge for _, edge, _ in wanted]
            for factor in factors(self._n):
                scaled = [s * factor.to(s).view(-1, *[1] * (s.dim() - 1 - self._axis)) for s in seeds]
                try:
                    grads = torch.autograd.grad(roots, edges, scaled, retain_graph=True, allow_unused=True)
                except RuntimeError as error:
                    if "use_reentrant" not in str(error):
                        raise
                    raise UnsupportedError(
                        f"the shapes in this model leave open where its {self._n} samples are, and re-entrant activation "
                        "checkpointing hides it: use torch.utils.checkpoint with use_reentrant=False, or another batch size"
                    ) from error
                found.append([_shaped(g, shape) for g, (_, _, shape) in zip(grads, wanted, strict=True)])
        return found


def _shaped(grad: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    return None if grad is None else grad.reshape(tuple(shape))
