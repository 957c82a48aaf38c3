"""The captured gradients, summed over samples, against autograd's own, along one direction for each parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache, partial

from torch import Tensor

from torch_secorder.autograd.double_precision import sum_in_double_precision
from torch_secorder.recording.batch import Projection, narrowest
from torch_secorder.verification.tolerances import GRADIENT_SUMS_FLOOR, gradient_sum


def unexplained_gradients(
    captured: Mapping[int, Sequence[Projection]], actual: Mapping[int, Tensor], norms: Tensor, half: bool
) -> list[int]:
    """The parameters whose gradient, along a direction, is not the sum of what was captured of it.

    If autograd has a gradient that the captured calls lack, it comes from outside of the model's forward, such as a weight
    penalty in the loss or a use in compiled code. The tolerance is relative to ``sqrt(N sum_n ||g_n||^2)`` for each use of the
    parameter, which bounds the sum of the gradients' norms. A small part of the same bound for all parameters is added, for a
    gradient that is zero up to rounding. The digits are those of the narrowest numbers that products were taken of.

    Args:
        captured: position -> for each batch of samples, the captured gradient along the direction.
        actual: position -> autograd's gradient along the same direction.
        norms: ``[parameters, N]``, the squared norms of the captured gradients.
        half: whether some gradient is in half precision.
    """
    floor = GRADIENT_SUMS_FLOOR * math.sqrt(float(sum_in_double_precision(norms)) * norms.shape[1])
    tolerance = cache(partial(gradient_sum, half=half))  # torch's settings, which decide it, stay the same here
    wrong = []
    for position, gradient in actual.items():
        found = captured.get(position, ())
        off = abs(sum(float(use.along) for use in found) - float(gradient))
        bound = sum(use.size for use in found) + floor
        dtype = narrowest(gradient.dtype, *(use.dtype for use in found))
        near = off <= tolerance(dtype, gradient.device.type) * bound
        if not (near and math.isfinite(bound)):  # A bound that is not finite explains nothing.
            wrong.append(position)
    return wrong
