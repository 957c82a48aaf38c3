"""What a backward pass can be asked about the outputs of the model's calls that it goes through."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from torch_secorder.autograd.engine import current_node
from torch_secorder.autograd.roots import sequence_number
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.batch_axis.samples import of_one
from torch_secorder.capture.model_run import Forward
from torch_secorder.graph.broadcast import broadcast_in_pass

# How many numbers are remembered; one backward pass may go through the outputs of several calls.
MOST_NUMBERS = 1024

# How many calls are remembered; the loss of a Siamese network depends on two or three.
MOST_CALLS = 64


@dataclass(frozen=True)
class Output:
    """An output that has samples, by a weak reference: it lives no longer than the user keeps it.

    Attributes:
        number: that of the node which made it.
        reference: finds the output.
        placement: where it has its samples.
    """

    number: int
    reference: weakref.ref[Tensor]
    placement: Placement


class ModelOutputs:
    """The nodes that made the outputs of the model's calls.

    Attributes:
        numbers: the numbers of the nodes that made the outputs of this and earlier calls -> which output it is.
        calls: the latest calls with such outputs, each with those that have samples.
        column: the run of the model, if its only output has the shape ``[n, 1]`` or ``[n]``; None once a loss was seen to compare
            such an output with every target.
    """

    def __init__(self) -> None:
        self._looks_at_column = True  # until it has been found once
        self.numbers: dict[int, int] = {}
        self.calls: deque[tuple[Forward, list[Output]]] = deque(maxlen=MOST_CALLS)
        self.column: Forward | None = None

    def keep(self, forward: Forward, outputs: Sequence[Tensor]) -> None:
        """Note the tensors that the model returns."""
        if len(self.numbers) > MOST_NUMBERS:
            self.numbers.clear()
        with_samples = []
        for index, (x, placement) in enumerate(zip(outputs, forward.placements, strict=True)):
            if x.grad_fn is not None:
                number = sequence_number(x.grad_fn)
                self.numbers[number] = index
                # The output of a single sample may have no axis left.
                where = placement or (of_one(x, 0) if forward.n == 1 else None)
                if where is not None:
                    with_samples.append(Output(number, weakref.ref(x), where))
        if with_samples:
            self.calls.append((forward, with_samples))
        if self._looks_at_column:
            self.column = forward if len(outputs) == 1 and outputs[0].shape in ((forward.n, 1), (forward.n,)) else None

    def broadcast(self, forward: Forward) -> tuple[str, tuple[int, ...]] | None:
        """Whether the loss compares each of n outputs with every target. It is called when a pass reaches the outputs.

        Returns:
            The name of the node that does it, and the outputs' shape there; None if none does.
        """
        outputs, n = current_node(), forward.n
        assert outputs is not None
        assert n is not None
        found, self.column = broadcast_in_pass(outputs, n), None
        self._looks_at_column = found is None
        return found
