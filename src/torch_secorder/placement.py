"""Where a tensor has its samples: the batch axis, and the sample that each of its indices belongs to.

Shapes can lie: a batch as large as a sequence is long, windows or heads folded into the batch, positions without a batch
axis at all. The evidence that can't is the gradient itself. Send a random seed r back from the model's outputs, and then the
same seed with sample n's part multiplied by w_n, which is 1 or 2: what belongs to sample n comes back multiplied by w_n,
exactly, since powers of two multiply without rounding. What belongs to several samples does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """Which axis counts samples, and how.

    Attributes:
        axis: the axis.
        fold: "none" if index n is sample n; "outer" if each sample has a run of neighbouring indices; "inner" if the
            samples alternate.
    """

    axis: int = 0
    fold: str = "none"

    def fits(self, shape: Sequence[int], n: int) -> bool:
        """Whether a tensor of this shape can be placed so."""
        size = shape[self.axis] if len(shape) > self.axis else 0
        return size == n if self.fold == "none" else size > 0 and size % n == 0

    def owner(self, size: int, n: int, device: torch.device) -> Tensor | None:
        """The sample of each index, ``[size]``; None if index n is sample n."""
        samples = torch.arange(n, device=device)
        if self.fold == "none":
            return None
        return samples.repeat_interleave(size // n) if self.fold == "outer" else samples.repeat(size // n)


class Unplaced(Enum):
    """What else the evidence can say of a tensor."""

    SHARED = "it belongs to no single sample"
    NOTHING = "no gradient reaches it"


Evidence = Placement | Unplaced


def weights(n: int) -> Tensor:
    """``w``, ``[n]``: ones and twos in no regular pattern, with both among any two neighbours that are the first or last."""
    bits = torch.randint(2, (n,), generator=torch.Generator().manual_seed(n))
    bits[0], bits[-1] = 0, 1
    return 1.0 + bits


def evidence(plain: Tensor | None, weighted: Tensor | None, w: Tensor) -> Evidence:
    """What two gradients, for a seed and for the seed times w, say of a tensor's samples."""
    if plain is None or weighted is None or not bool(plain.any()):
        return Unplaced.NOTHING
    n = len(w)
    # Of several axes that would do, the first with as many indices as samples is meant.
    folds = [("none", axis) for axis in range(plain.dim())]
    folds += [(fold, axis) for axis in range(plain.dim()) for fold in ("outer", "inner")]
    scale = weighted.double().norm()
    for fold, axis in folds:
        placement = Placement(axis, fold)
        size = plain.shape[axis]
        if not placement.fits(plain.shape, n) or (fold != "none" and size == n):
            continue
        owner = placement.owner(size, n, plain.device)
        factor = w.to(plain.device, plain.dtype)
        factor = factor if owner is None else factor[owner]
        expected = plain * factor.view(-1, *[1] * (plain.dim() - axis - 1))
        if (weighted - expected).double().norm() <= 1e-3 * scale:
            return placement
    return Unplaced.SHARED
