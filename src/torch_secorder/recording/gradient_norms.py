"""A backward pass of the user's that is under way, as a monitor sees it."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_secorder.capture.records import SMALL
from torch_secorder.per_sample import at_least_float32
from torch_secorder.recording.accumulator import Pass
from torch_secorder.recording.small_calls import TOGETHER


@dataclass(eq=False)
class OpenPass:
    """A backward pass that is under way.

    Attributes:
        task: its number.
        autocast: whether its operations may be done in half precision.
        norms: position -> ||gradient||.
        several: the same for gradients that were taken together: their positions, and a norm for each.
        small: position -> gradient, for small ones whose norms are still to be taken.
        projections: position -> the gradient along one direction.
    """

    task: int
    collected: Pass
    autocast: bool
    norms: dict[int, Tensor] = field(default_factory=dict)
    several: list[tuple[list[int], Tensor]] = field(default_factory=list)
    small: dict[int, Tensor] = field(default_factory=dict)
    projections: dict[int, Tensor] = field(default_factory=dict)
    error: Exception | None = None

    def add(self, position: int, grad: Tensor) -> None:
        """A parameter's gradient."""
        # At once, or a reference to it is kept, so that autograd adds a copy to .grad: what becomes of that later, there or in
        # a communication buffer, is not this pass's gradient any more.
        if (known := self.collected.gradient_norms.pop(position, None)) is not None and grad.dtype == known.dtype:
            self.norms[position] = known
            return
        if grad.numel() > SMALL or grad.dtype not in (torch.float32, torch.float64) or grad.is_sparse:
            self.norms[position] = norm(grad)
            return
        self.small[position] = grad
        if len(self.small) == TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Take the norms of the small gradients."""
        alike: dict[Hashable, list[int]] = {}
        for position, grad in self.small.items():
            alike.setdefault((grad.shape, grad.dtype, grad.device), []).append(position)
        for positions in alike.values():
            rows = torch.stack([self.small[position] for position in positions]).reshape(len(positions), -1)
            self.several.append((positions, torch.linalg.vector_norm(rows, dim=1)))
        self.small.clear()

    def all_norms(self) -> tuple[list[int], Tensor]:
        """Every ||gradient|| in float64 on one device, and of which parameter it is."""
        if self.small:
            self.flush()
        parts = [*(norm[None] for norm in self.norms.values()), *(norms for _, norms in self.several)]
        positions = list(itertools.chain(self.norms, *(several for several, _ in self.several)))
        if len({(part.device, part.dtype) for part in parts}) > 1:
            parts = [part.to("cpu", torch.float64) for part in parts]
        return positions, torch.cat(parts).double() if parts else torch.zeros(0)


def norm(grad: Tensor) -> Tensor:
    """||grad||, in at least float32."""
    values = grad.detach().coalesce().values() if grad.is_sparse else grad.detach()
    return torch.linalg.vector_norm(at_least_float32(values))


def is_autocast() -> bool:
    """Whether operations may be done in half precision."""
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def full_precision() -> ExitStack:
    """A context without autocast, which a backward pass inside an autocast block would otherwise put on our sums."""
    stack = ExitStack()
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    return stack
