"""Whether each sample that the outputs show was computed from the same rows of data, as many as there are samples."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from torch_secorder.batch_axis.argument_samples import rows_of, shows_numbers
from torch_secorder.batch_axis.evidence import candidates
from torch_secorder.batch_axis.labels import SEVERAL, Labels

# How many tensors of one shape each member takes, at most, or else they are taken for those of single samples.
MOST_OF_ONE_SHAPE = 4


class Taken:
    """Data that some of the samples which the outputs show were computed from, each from all of it."""

    def __init__(self, number: int, data: Tensor):
        self.number, self.data, self.samples = number, data, set[int]()

    def is_equal_to(self, x: Tensor) -> bool:
        """Whether another tensor has the same numbers; the host waits where it is not the same tensor."""
        one = self.data
        return one is x or (
            one.shape == x.shape and one.dtype == x.dtype and one.device == x.device and torch.equal(one, x)
        )


def first_of_same_rows(operands: Iterable[tuple[Tensor, Labels]], n: int) -> int | None:
    """Of which data each sample of the outputs takes the same n rows; None if there is none, or data tells them apart.

    Such rows are the samples, if anything that the outputs are computed from is: steps or members in front take all of them each.

    Args:
        operands: what calls and nodes take, and for each entry of that the sample of the outputs that is computed from it.
        n: how many samples there are.
    """
    taken: list[Taken] = []
    for number, (x, labels) in enumerate(operands):
        # What requires a gradient was computed from parameters, which may be those of members.
        if x.requires_grad or x.numel() == 1 or not shows_numbers(x):
            continue
        samples, axes = np.unique(labels), [axis for axis, size in enumerate(labels.shape) if size > 1]
        if SEVERAL in samples:
            return None  # Labels may say so of an entry that one sample takes.
        if len(samples) > 1:
            # Of several samples' entries, those of each one have to be the same.
            if len(axes) > 1 or not np.array_equal(labels.ravel(), np.arange(n)):
                return None
            indices = x.detach().movedim(axes[0], 0)
            if not bool((indices == indices[:1]).all()):
                return None
            x, samples = indices[0], np.arange(n)
        known = next((one for one in taken if one.is_equal_to(x)), None)
        if known is None:
            taken.append(known := Taken(number, x))
            if sum(one.data.shape == x.shape for one in taken) > MOST_OF_ONE_SHAPE:
                return None
        known.samples.update(samples.tolist())
    if any(len(one.samples) < n for one in taken):
        return None
    return next((one.number for one in taken if _has_rows(one.data, n)), None)


def _has_rows(x: Tensor, n: int) -> bool:
    """Whether some axis of a tensor has n rows that are not all equal."""
    rows = (rows_of(x, one, n) for one in candidates(x.shape, n))
    return any(not bool((one == one[:1]).all()) for one in rows)
