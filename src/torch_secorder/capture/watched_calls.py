"""What is kept of a call of which only the output is of interest."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_secorder.autograd.double_precision import in_double_precision, sum_in_double_precision
from torch_secorder.autograd.versions import version
from torch_secorder.errors import CoverageError
from torch_secorder.per_sample import at_least_float32, real_entries


@dataclass(frozen=True, eq=False)
class WatchedCall:
    """A module's output as it was in forward.

    Attributes:
        moments: its number of elements, sum, sum of squares, minimum and maximum; None if nobody asked for them.
    """

    moments: Tensor | None
    _output: Tensor | None
    _version: int

    @property
    def output(self) -> Tensor:
        """The output.

        Raises:
            CoverageError: if it was changed in place since.
        """
        assert self._output is not None
        if version(self._output) != self._version:
            raise CoverageError("its output was changed in place after the call; change it out of place for on_output=")
        return self._output


def watched_call(
    module: nn.Module, args: object, kwargs: object, output: Tensor, *, with_moments: bool, with_output: bool
) -> WatchedCall:
    """What is kept of a call under way."""
    found = _moments(output) if with_moments else None
    return WatchedCall(found, output.detach() if with_output else None, version(output))


def _moments(output: Tensor) -> Tensor:
    """Number of elements, sum, sum of squares, minimum and maximum of a module's output, in float64.

    The elements of a complex output are its real and its imaginary parts.
    """
    x = real_entries((output.values() if output.is_nested else output).detach())
    if not x.numel():
        return in_double_precision(x.float()).new_tensor([0.0, 0.0, 0.0, math.inf, -math.inf])
    x = at_least_float32(x)
    ends = in_double_precision(torch.stack([x.min(), x.max()]))
    sums = torch.stack([sum_in_double_precision(x), sum_in_double_precision(x, x)])
    return torch.cat([ends.new_full((1,), x.numel()), sums, ends])
