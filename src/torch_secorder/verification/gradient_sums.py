"""Whether what was captured adds up to autograd's own gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# How exactly autograd's own gradient can be expected to be the sum of the captured ones: half precision rounds it, GPUs
# may multiply with few digits.
TOLERANCES = {(torch.float64, "cpu"): 1e-8, (torch.float32, "cpu"): 1e-4, (torch.float64, "cuda"): 1e-6}
TOLERANCE, HALF_TOLERANCE = 1e-2, 5e-2  # elsewhere, and in half precision or under autocast


def unexplained_gradients(
    captured: Mapping[int, Sequence[tuple[Tensor, float]]],
    actual: Mapping[int, Tensor],
    squared_norms: Tensor,
    half: bool,
) -> list[int]:
    """The positions whose gradient, projected on a direction, is not what was captured of it.

    A gradient that autograd has and the captured calls have not comes from outside of the model's forward: a weight
    penalty in the loss, a use in compiled code. The tolerance is relative to ``sqrt(N sum_n ||g_n||^2)``, which bounds
    the sum of the gradients' norms, for each use of the parameter, with a hundredth of that of all parameters for
    gradients that are zero but for rounding.

    Args:
        captured: position -> of each batch of samples the projection, and the bound on its parts.
        actual: position -> the projection of autograd's gradient.
        squared_norms: ``[parameters, n]``, those of all samples.
        half: whether half precision was involved.
    """
    wrong = []
    floor = 1e-2 * math.sqrt(float(squared_norms.double().sum()) * squared_norms.shape[1])
    for position, projection in actual.items():
        found = captured.get(position, ())
        sum_of_parts = sum(float(along) for along, _ in found)
        bound = sum(size for _, size in found) + floor
        tolerance = TOLERANCES.get((projection.dtype, projection.device.type), TOLERANCE)
        if not abs(sum_of_parts - float(projection)) <= (HALF_TOLERANCE if half else tolerance) * bound:
            wrong.append(position)
    return wrong
