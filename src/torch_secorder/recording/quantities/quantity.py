"""The interface of a quantity and of its parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from torch_secorder.capture.records import Record
from torch_secorder.per_sample import PerSampleGradient

if TYPE_CHECKING:
    from typing_extensions import Self


class Part:
    """What one backward pass adds to a quantity, in the units of that pass. This one takes nothing."""

    def squared_norms(self, position: int, form: PerSampleGradient) -> Tensor | None:
        """The squared norms of a parameter's gradients, ``[n]``, if this part computes something that gives them anyway.

        :meth:`on_form` is called next, with these norms. None leaves them to the gradients' own way.
        """
        return None

    def on_form(self, position: int, form: PerSampleGradient, squared_norms: Tensor) -> None:
        """A parameter's gradients for all samples of a batch, and their squared norms, ``[n]``."""

    def on_output(self, record: Record, grad: Tensor, by_sample: bool) -> None:
        """A watched module's output: its call, and the gradient in the output.

        With ``by_sample``, the first axis of the gradient counts the samples. Without, each of its numbers belongs to one
        sample, but nothing says to which.
        """

    def tensors(self) -> list[Tensor]:
        """The tensors that are read on the host; they go there together with the squared norms when the pass is over."""
        return []

    def with_tensors(self, tensors: Iterable[Tensor]) -> Self:
        """The same part with other tensors in place of these, in the same order."""
        return self

    def scaled(self, factor: float) -> Self:
        """The same with all squares multiplied."""
        return self

    def plus(self, other: Self) -> Self:
        """The same samples after another backward pass through the same forward, whose squares add to these."""
        return self

    def finite(self, bad: Tensor, names: Sequence[str]) -> Self:
        """The same without the samples that are not finite.

        Args:
            bad: ``[parameters, n]``, True where a squared norm is not finite.
            names: the parameters' names, for errors.

        Raises:
            NonFiniteError: if such a sample cannot be taken out any more.
        """
        return self


class Quantity(ABC):
    """What is accumulated over the samples of all backward passes.

    Attributes:
        name: the argument that asks for it, and the property of the results that shows it.
        takes_forms: whether its parts are made of the parameters' gradients.
        watches_outputs: whether the outputs of all modules are hooked for it.
        accumulates: whether results keep anything for it.
        torn: whether an addition in place was begun and not finished, so that its numbers cannot be used.
    """

    name: ClassVar[str]
    takes_forms: ClassVar[bool] = False
    watches_outputs: ClassVar[bool] = False
    accumulates: ClassVar[bool] = True
    torn = False

    def __init__(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]], how: Any = True):
        self.names, self.shapes = list(names), list(shapes)

    @staticmethod
    def part(names: Sequence[str], how: Any) -> Part:
        """An empty part, for one backward pass.

        Args:
            names: the parameters, as in the quantity.
            how: what the argument that asks for the quantity means: True, or which part of it is kept.
        """
        return Part()

    @abstractmethod
    def add(self, part: Any, t: Tensor, scale: float) -> None:
        """Add a pass.

        Args:
            part: what :meth:`part` has collected.
            t: the squared norms of the gradients of l_n, ``[p, n]`` in float64.
            scale: the factor for the part's squares.
        """

    @abstractmethod
    def merge(self, other: Any) -> None:
        """Add what another quantity of this kind has accumulated; the other one stays as it is."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Everything, as tensors, numbers, strings, and lists and mappings of them."""

    @abstractmethod
    def load(self, state: Mapping[str, Any]) -> None:
        """Replace everything by what :meth:`state` gave."""
