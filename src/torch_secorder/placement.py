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
            samples alternate; "listed" if only a list tells, as behind a router.
        listed: for "listed", the sample of each index.
    """

    axis: int = 0
    fold: str = "none"
    listed: Tensor | None = None

    def fits(self, shape: Sequence[int], n: int) -> bool:
        """Whether a tensor of this shape can be placed so."""
        size = shape[self.axis] if len(shape) > self.axis else 0
        if self.listed is not None:
            return size == len(self.listed)
        return size == n if self.fold == "none" else size > 0 and size % n == 0

    @property
    def whole(self) -> bool:
        """Whether all of the tensor belongs to one sample: a module that was called for each sample in turn."""
        return self.listed is not None and bool((self.listed == self.listed[0]).all())

    def owner(self, size: int, n: int, device: torch.device) -> Tensor | None:
        """The sample of each index, ``[size]``; None if index n is sample n."""
        if self.listed is not None:
            return self.listed.to(device)
        samples = torch.arange(n, device=device)
        if self.fold == "none":
            return None
        return samples.repeat_interleave(size // n) if self.fold == "outer" else samples.repeat(size // n)


class Unplaced(Enum):
    """What else the evidence can say of a tensor."""

    SHARED = "it belongs to no single sample"
    SCATTERED = "each of its rows belongs to one sample, in no order"
    NOTHING = "no gradient reaches it"


Evidence = Placement | Unplaced


def weights(n: int) -> Tensor:
    """``w``, ``[n]``: ones and twos in no regular pattern, with both among any two neighbours that are the first or last."""
    bits = torch.randint(2, (n,), generator=torch.Generator().manual_seed(n))
    bits[0], bits[-1] = 0, 1
    return 1.0 + bits


def evidence(plain: Tensor | None, weighted: Tensor | None, w: Tensor) -> Evidence:
    """What two gradients, for a seed and for the seed times w, say of a tensor's samples."""
    if plain is None or weighted is None or not plain.numel():
        return Unplaced.NOTHING
    # Numbers near the smallest ones don't double exactly.
    if not float(plain.abs().max()) > 1e4 * torch.finfo(plain.dtype).tiny:
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
    if not plain.dim():
        return Unplaced.SHARED
    rows, twice = plain.double().flatten(1) if plain.dim() > 1 else plain.double()[:, None], weighted.double()
    twice = twice.reshape(rows.shape)
    off = torch.minimum((twice - rows).norm(dim=1), (twice - 2 * rows).norm(dim=1))
    return Unplaced.SCATTERED if bool((off <= 1e-3 * rows.norm(dim=1)).all()) else Unplaced.SHARED


def bits(n: int) -> list[Tensor]:
    """Weights of 1 and 2 for the samples, one set for each binary digit of a sample's number."""
    samples = torch.arange(n)
    return [1.0 + (samples >> digit & 1) for digit in range(max(1, (n - 1).bit_length()))]


def listed(plain: Tensor, weighted: Sequence[Tensor]) -> Placement:
    """The placement of scattered rows, from the gradients for every set of :func:`bits`; rows without a gradient go anywhere."""
    rows = plain.double().reshape(len(plain), -1)
    owner = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    for digit, twice in enumerate(weighted):
        change = (twice.double().reshape(rows.shape) - rows).norm(dim=1)
        owner |= (change > 0.5 * rows.norm(dim=1)).long() << digit
    return Placement(0, "listed", owner)
