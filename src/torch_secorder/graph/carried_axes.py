"""Axes along which a node carries something from one index to others, so that no samples can be on them."""

from __future__ import annotations

from dataclasses import dataclass

from torch.autograd.graph import GradientEdge, Node

from torch_secorder.autograd.nodes import value_shape
from torch_secorder.autograd.saved import knows, saved
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.errors import ShapeError

# Nodes that carry something from each index along an axis to all later ones, as a cumulative sum does.
CARRIES = {f"{name}Backward0" for name in ("Cumsum", "Cumprod", "Cummax", "Cummin", "Logcumsumexp")}

# Fused attention, whose output has its positions on the last axis but one. Each of them takes something of others.
_KINDS = (
    "FlashAttentionForCpu",
    "FlashAttention",
    "EfficientAttention",
    "CudnnAttention",
    "FusedAttentionOverrideable",
)
ATTENDS = {f"ScaledDotProduct{kind}Backward0" for kind in _KINDS}


@dataclass(frozen=True)
class CarriedAxis:
    """The output of a node that carries something along an axis, on which no samples can be.

    Attention among the tokens of several samples, which a mask keeps apart, has more tokens than samples there.

    Attributes:
        name: the node's.
        axis: the axis.
        shape: the output's.
        edge: where the output's gradient arrives.
    """

    name: str
    axis: int
    shape: tuple[int, ...]
    edge: GradientEdge

    @classmethod
    def of(cls, node: Node, n: int | None) -> CarriedAxis | None:
        """That of a node which is known to carry; None for one without axes, and where this torch doesn't show its axis."""
        name, shape = node.name(), value_shape(node, 0)
        if name in ATTENDS:
            return cls(name, len(shape) - 2, shape, GradientEdge(node, 0)) if shape[-2] == n else None
        if not shape or not knows(name, "axis"):
            return None
        return cls(name, saved(node, "axis") % len(shape), shape, GradientEdge(node, 0))

    def contradicts_shapes(self, n: int) -> bool:
        """Whether the axis may be taken for that of n samples."""
        return self.shape[self.axis] == n

    def contradicts(self, found: Placement) -> bool:
        """Whether samples that were found there are on the axis."""
        return found.axis == self.axis

    def refusal(self, n: int) -> ShapeError:
        """The refusal of samples that are on the axis."""
        return ShapeError(
            f"{self.name} carries something along axis {self.axis} of a tensor of shape {self.shape} from one index to others, "
            f"where the model's {n} samples would be: pass batch_axis= if the model's inputs and outputs have their samples on "
            "another axis than the first; a cumulative sum or attention over samples leaves none a gradient of its own"
        )
