"""What is kept about per-sample gradients besides their squared norms: one file for each quantity.

A quantity says what it takes from a parameter's gradients or a module's output in one backward pass (its ``Part``), how parts
add up over passes, how two quantities merge, and how they are saved. :class:`~torch_secorder.results.Results` has a property for
each of them, named like the quantity, which is also the argument that asks for it.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from torch_secorder.errors import ArgumentError
from torch_secorder.model.parameters import Table
from torch_secorder.recording.quantities.diagonal import Diagonal
from torch_secorder.recording.quantities.layout import layout_of
from torch_secorder.recording.quantities.output_calls import OnOutput, OutputCalls
from torch_secorder.recording.quantities.output_traces import OutputTraces
from torch_secorder.recording.quantities.quantity import Part, Quantity
from torch_secorder.recording.quantities.sample_rows import SampleIds, SampleRows

QUANTITIES: dict[str, type[Quantity]] = {kind.name: kind for kind in (Diagonal, SampleRows, OutputTraces, OutputCalls)}

# Name of a quantity -> whether it is kept, or which part of it is kept.
Keeps = Mapping[str, Any]


def kept(keeps: Keeps, model: nn.Module, table: Table) -> dict[str, Any]:
    """What the arguments that ask for quantities mean for a model's parameters.

    Raises:
        ArgumentError: for an invalid argument.
    """
    function = keeps.get(OutputCalls.name)
    if function is not None and not callable(function):
        raise ArgumentError(f"on_output must be a function of (module, output, grad), not {function!r:.80}")
    return {name: layout_of(how, model, table) if name == Diagonal.name else how for name, how in keeps.items()}


def wanted(keeps: Keeps) -> dict[str, Any]:
    """The quantities that are kept."""
    return {name: how for name, how in keeps.items() if how}


__all__ = [
    "QUANTITIES",
    "Diagonal",
    "Keeps",
    "OnOutput",
    "OutputTraces",
    "Part",
    "Quantity",
    "SampleIds",
    "SampleRows",
    "kept",
    "wanted",
]
