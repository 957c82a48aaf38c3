"""What is kept of per-sample gradients besides their squared norms: a file for each quantity.

A quantity says what it takes of a parameter's gradients or of a module's output in one backward pass (its ``Part``), how parts
add up over passes, how two quantities merge, and how they are saved. :class:`~torch_secorder.results.Results` has a property for
each of them, named like the quantity, which is also the argument that asks for it.
"""

from torch_secorder.recording.quantities.diagonal import Diagonal
from torch_secorder.recording.quantities.output_traces import OutputTraces
from torch_secorder.recording.quantities.quantity import Part, Quantity
from torch_secorder.recording.quantities.sample_rows import SampleIds, SampleRows

QUANTITIES: dict[str, type[Quantity]] = {kind.name: kind for kind in (Diagonal, SampleRows, OutputTraces)}

__all__ = ["QUANTITIES", "Diagonal", "OutputTraces", "Part", "Quantity", "SampleIds", "SampleRows"]
