"""What labels say of one tensor: on which axis it has its samples, and in which order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from torch_secorder.batch_axis.evidence import Finding, Unplaced, candidates, is_of_features
from torch_secorder.batch_axis.labels import NOBODY, SEVERAL, Labels, joined_along, on_axis
from torch_secorder.batch_axis.placement import Layout, Placement


def what_labels_say(labels: Labels, shape: tuple[int, ...], n: int) -> Finding:
    """Where a tensor of this shape has its n samples, by the labels of its gradient."""
    if (labels == NOBODY).all():
        return Finding(Unplaced.NO_GRADIENT)
    if not shape or (labels == SEVERAL).any():
        return Finding(Unplaced.SHARED_BY_SAMPLES)
    fitting = [one for one in candidates(shape, n) if _explains(labels, one, shape, n)]
    listed = _listed(labels, shape)
    if not fitting or (is_of_features(fitting[0], shape) and isinstance(listed.evidence, Placement)):
        return listed
    return Finding(fitting[0], len(fitting) == 1, tuple(fitting[1:]))


def without_contradicted(found: Finding, labels: Labels, shape: tuple[int, ...], n: int) -> Finding:
    """What passes found of a tensor, without what its labels exclude; what the labels say if they exclude all of it.

    Rows that are far smaller than others, such as those beside a norm of zeros, fit readings that their labels don't.
    """
    if not isinstance(found.evidence, Placement):
        return found
    fitting = (found.evidence, *found.others)
    of_one_sample = labels >= 0
    possible = [one for one in fitting if not (of_one_sample & (labels != labels_of(one, shape, n))).any()]
    if not possible:
        return what_labels_say(labels, shape, n)
    return found if len(possible) == len(fitting) else Finding(possible[0], found.proven, tuple(possible[1:]))


def _listed(labels: Labels, shape: Sequence[int]) -> Finding:
    """Samples row by row, in any order."""
    rows = joined_along(labels, range(1, len(shape))).reshape(-1)
    if (rows == SEVERAL).any():
        return Finding(Unplaced.SHARED_BY_SAMPLES)
    # A row without a gradient may belong to any sample.
    rows = np.broadcast_to(np.where(rows == NOBODY, 0, rows), shape[:1])
    return Finding(Placement(0, Layout.INDEXED, torch.from_numpy(rows.copy())))


def _explains(labels: Labels, placement: Placement, shape: Sequence[int], n: int) -> bool:
    """Whether the labels at each index along a placement's axis are those of the index's sample, or NOBODY."""
    return bool(((labels == labels_of(placement, shape, n)) | (labels == NOBODY)).all())


def labels_of(placement: Placement, shape: Sequence[int], n: int) -> Labels:
    """The labels of a tensor of this shape that has its samples there."""
    if not shape:
        return np.zeros((), np.int64)
    own = placement.sample_of_index(shape[placement.axis], n, torch.device("cpu"))
    samples = np.arange(n) if own is None else own.numpy()
    return on_axis(samples, placement.axis, len(shape))
