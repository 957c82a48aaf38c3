"""Axes along which a node carries something from one index to others, or takes statistics, so that no samples can be on them."""

from __future__ import annotations

from dataclasses import dataclass

from torch.autograd.graph import GradientEdge, Node

from torch_secorder.autograd.nodes import value_shape
from torch_secorder.autograd.saved import knows, saved
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.errors import CoupledSamplesError, CurvatureError, ShapeError

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

# Batch norms that no module announces: in functions, and in code that torch.jit has scripted or traced.
NORMALIZES = {"NativeBatchNormBackward0", "CudnnBatchNormBackward0"}

# Nodes with an axis that is unfit for samples, whatever the sizes are.
UNFIT = CARRIES | NORMALIZES


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
        if name in NORMALIZES:
            return _AllButChannels(name, 0, shape, GradientEdge(node, 0)) if _of_the_batch(node) else None
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

    def refusal(self, n: int) -> CurvatureError:
        """The refusal of samples that are on the axis."""
        return ShapeError(
            f"{self.name} carries something along axis {self.axis} of a tensor of shape {self.shape} from one index to others, "
            f"where the model's {n} samples would be: pass batch_axis= if the model's inputs and outputs have their samples on "
            "another axis than the first; a cumulative sum or attention over samples leaves none a gradient of its own"
        )


class _AllButChannels(CarriedAxis):
    """The output of a batch norm with the statistics of what it is given; an instance norm has its samples among the channels."""

    def contradicts_shapes(self, n: int) -> bool:
        return self.shape[0] > 1  # Instance norms of torch fold this axis into that of the channels.

    def contradicts(self, found: Placement) -> bool:
        index = found.sample_index
        of_one = index is not None and bool((index == index[:1]).all())  # as in a loop over samples, each by itself
        return found.axis != 1 and not of_one

    def refusal(self, n: int) -> CurvatureError:
        return CoupledSamplesError(
            f"a batch_norm on a tensor of shape {self.shape}, in a function or in scripted code, normalizes with the statistics "
            "of the whole batch, so per-sample gradients do not exist: call model.eval(), or pass training=False with running "
            "statistics, or use a norm of each sample, such as group_norm"
        )


def _of_the_batch(node: Node) -> bool:
    """Whether a batch norm takes the statistics of the batch, as far as this torch shows it."""
    return knows(node.name(), "training") and bool(saved(node, "training"))
