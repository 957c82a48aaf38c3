"""What is kept of a call of which only the output is of interest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from torch_secorder.autograd.versions import version
from torch_secorder.capture.module_hooks import moments
from torch_secorder.errors import CoverageError


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
    found = moments(module, args, kwargs, output) if with_moments else None
    return WatchedCall(found, output.detach() if with_output else None, version(output))
