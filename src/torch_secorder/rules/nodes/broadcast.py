"""Values that are broadcast along the batch, or repeated for it."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from torch_secorder.autograd.saved import saved
from torch_secorder.batch_axis.placement import Layout
from torch_secorder.per_sample import sum_over
from torch_secorder.rules.elementwise import along_slope
from torch_secorder.rules.node_rules import NodeUse, node_rule, times


@node_rule("PreluKernelBackward0", lambda at: at.index == 1 and at.is_broadcast, reads=("input",))
def prelu(at: NodeUse, g: Tensor) -> Tensor:
    """Slopes below zero."""
    return at.summed(along_slope(saved(at.node, "input"), g))


def _repeats_samples(at: NodeUse) -> bool:
    """Whether every sample has whole repetitions."""
    whole = at.placement.layout is Layout.BLOCKS and saved(at.node, "times")[at.placement.axis] % at.n == 0
    return at.is_broadcast or whole


@node_rule("RepeatBackward0", _repeats_samples, reads=("times",))
def repeat(at: NodeUse, g: Tensor) -> Tensor:
    """A tensor that is repeated for every sample."""
    times, axis = saved(at.node, "times"), at.placement.axis
    sizes = [1] * (g.dim() - len(at.shape)) + list(at.shape)
    g = g.reshape([size for pair in zip(times, sizes, strict=True) for size in pair])
    others = [2 * d for d in range(len(times)) if d != axis]
    return (sum_over(g, others) if others else g).movedim(axis, 0).reshape(times[axis], *at.shape)


@node_rule("MulBackward0", lambda at: at.is_broadcast, reads=("left", "right"))
def mul(at: NodeUse, g: Tensor) -> Tensor:
    """A factor that is broadcast along the batch."""
    return at.summed(g * saved(at.node, "right" if at.index == 0 else "left"))


@node_rule("AddBackward0", lambda at: at.is_broadcast, reads=("alpha",))
def add(at: NodeUse, g: Tensor) -> Tensor:
    """A summand that is broadcast along the batch."""
    return at.summed(g if at.index == 0 else times(saved(at.node, "alpha"), g))


@node_rule("SubBackward0", lambda at: at.is_broadcast, reads=("alpha",))
def sub(at: NodeUse, g: Tensor) -> Tensor:
    """Either side of a difference that is broadcast along the batch."""
    return at.summed(g if at.index == 0 else g * -saved(at.node, "alpha"))


@node_rule("ExpandBackward0", lambda at: at.is_broadcast)
def expand(at: NodeUse, g: Tensor) -> Tensor:
    """A tensor that is expanded to the batch, as class tokens are."""
    return at.summed(g)


# Nodes that compute entry by entry, and the inputs whose gradients they return in the output's shape; autograd sums over what
# was broadcast afterwards.
BY_ENTRIES: dict[str, tuple[int, ...]] = {
    "DivBackward0": (0, 1),
    "DivBackward2": (0, 1),
    "RsubBackward0": (0, 1),
    "LerpBackward0": (0, 1),
    "LerpBackward1": (0, 1, 2),
    "PowBackward1": (0, 1),
    "MaximumBackward0": (0, 1),
    "MinimumBackward0": (0, 1),
    "ClampBackward0": (0, 1, 2),
    "ClampMinBackward1": (0, 1),
    "ClampMaxBackward1": (0, 1),
    "WhereBackward0": (0, 1),
    "Atan2Backward0": (0, 1),
    "LogaddexpBackward0": (0, 1),
    "AddcmulBackward0": (0, 1, 2),
    "AddcdivBackward0": (0, 1, 2),
    "MaskedFillBackward0": (0,),
}


def _broadcasts(inputs: tuple[int, ...], at: NodeUse) -> bool:
    return at.index in inputs and at.is_broadcast


def by_entries(at: NodeUse, g: Tensor) -> Tensor | None:
    """A value that is broadcast along the batch, from one call of the node with the gradients of all samples.

    The result is None if the node itself sums this gradient over the samples, as in some versions of torch.
    """
    found = at.vjp(g)
    return at.summed(found) if found.shape == at.output_shape else None


for _kind, _inputs in BY_ENTRIES.items():
    node_rule(_kind, partial(_broadcasts, _inputs), calls=True)(by_entries)
