"""What is kept of a module's call if only its output is of interest."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_secorder.autograd.double_precision import in_parts, on_host, widest_dtype
from torch_secorder.autograd.versions import version
from torch_secorder.errors import CoverageError
from torch_secorder.per_sample import at_least_float32, real_entries


@dataclass(frozen=True, eq=False)
class Moments:
    """The moments of one output's elements; a complex output counts with its real and imaginary parts.

    Attributes:
        count: the number of elements.
        values: minimum and maximum, then sums and then norms of parts, on the output's device in the widest dtype that it has.
    """

    count: int
    values: Tensor

    @classmethod
    def of(cls, output: Tensor) -> Moments:
        """The moments of an output."""
        x = real_entries((output.values() if output.is_nested else output).detach())
        if not x.numel():
            return cls(0, torch.tensor([math.inf, -math.inf], dtype=torch.float64, device="cpu"))
        x, wide = at_least_float32(x), widest_dtype(x.device)
        parts = in_parts(x)
        sums = [part.sum(1, dtype=wide) for part in parts]
        norms = [torch.linalg.vector_norm(part, dim=1, dtype=wide) for part in parts]
        return cls(x.numel(), torch.cat([torch.stack(x.aminmax()).to(wide), *sums, *norms]))

    def pooled(self) -> list[float]:
        """Number of elements, sum, sum of squares, minimum and maximum."""
        values = on_host(self.values)
        ends, (sums, norms) = values[:2].tolist(), values[2:].unflatten(0, (2, -1))
        return [float(self.count), float(sums.sum()), float(norms.square().sum()), *ends]


@dataclass(frozen=True, eq=False)
class WatchedCall:
    """A module's output as it was in forward.

    Attributes:
        moments: the moments of its elements; None if they were not asked for.
    """

    moments: Moments | None
    _output: Tensor | None
    _version: int

    @property
    def output(self) -> Tensor:
        """The output.

        Raises:
            CoverageError: if the output was changed in place since.
        """
        assert self._output is not None
        if version(self._output) != self._version:
            raise CoverageError("its output was changed in place after the call; change it out of place for on_output=")
        return self._output


def watched_call(
    module: nn.Module, args: object, kwargs: object, output: Tensor, *, with_moments: bool, with_output: bool
) -> WatchedCall:
    """What is kept of a running call."""
    found = Moments.of(output) if with_moments else None
    return WatchedCall(found, output.detach() if with_output else None, version(output))
