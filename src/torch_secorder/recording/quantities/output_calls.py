"""A user's function, called with every module's output and its gradient. Nothing is accumulated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from torch_secorder.capture.records import Record
from torch_secorder.errors import CurvatureError, ShapeError
from torch_secorder.recording.quantities.quantity import Part, Quantity

OnOutput = Callable[[nn.Module, Tensor, Tensor], None]


class OutputCallsPart(Part):
    """The calls of the user's function in one backward pass."""

    def __init__(self, function: OnOutput):
        self._function = function

    def on_output(self, record: Record, grad: Tensor, by_sample: bool) -> None:
        if not by_sample:
            return
        if (
            record.site.placement is None and record.site.name
        ):  # The model's own output is where the samples are counted.
            _require_one_axis(record, len(grad))
        axis = 0 if record.placement is None else record.placement.axis
        try:
            output = record.kept.output
        except CurvatureError as error:
            raise type(error)(f"{record.site}: {error}") from error
        if record.placement is None:  # All samples share it.
            output = output.expand(grad.shape)
        self._function(record.site.module, output.movedim(axis, 0) if axis else output, grad)


def _require_one_axis(record: Record, n: int) -> None:
    """Raise if several axes of an output are as long as there are samples, since nothing else tells them apart."""
    axes = [str(axis) for axis, size in enumerate(record.shape) if size == n]
    if n > 1 and len(axes) > 1:
        raise ShapeError(
            f"{record.site}: its output of shape {tuple(record.shape)} may have the {n} samples on axis {' or '.join(axes)}, and "
            f"on_output= gets it with the samples first: pass batch_axis={{'modules': {{{record.site.name!r}: axis}}}}"
        )


class OutputCalls(Quantity):
    """The quantity of a user's function, which has nothing to add, merge or save."""

    name: ClassVar[str] = "on_output"
    watches_outputs: ClassVar[bool] = True
    accumulates: ClassVar[bool] = False

    @staticmethod
    def part(names: Sequence[str], how: OnOutput) -> OutputCallsPart:
        return OutputCallsPart(how)

    def add(self, part: Part, t: Tensor, scale: float) -> None:
        pass

    def merge(self, other: OutputCalls) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        pass
