"""The outputs of the model's latest call, for whoever asks for them between the call and its backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor

from torch_secorder.autograd.engine import current_node
from torch_secorder.autograd.roots import sequence_number
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.batch_axis.samples import of_one
from torch_secorder.capture.model_run import Forward
from torch_secorder.errors import LifecycleError
from torch_secorder.graph.broadcast import broadcast_in_pass

# How many numbers are remembered; one backward pass may go through the outputs of several calls.
MOST_NUMBERS = 1024


class ModelOutputs:
    """The outputs of the latest call that have samples, by weak references: they live no longer than the user keeps them.

    Attributes:
        numbers: the numbers of the nodes that made the outputs of this and earlier calls -> which output it is.
        column: the run of the model, if its only output has the shape ``[n, 1]`` or ``[n]``; None once a loss was seen to compare
            such an output with every target.
    """

    def __init__(self) -> None:
        self._outputs: list[tuple[weakref.ref[Tensor], Placement]] = []
        self._looks_at_column = True  # until it has been found once
        self.numbers: dict[int, int] = {}
        self.column: Forward | None = None

    def keep(self, forward: Forward, outputs: Sequence[Tensor]) -> None:
        """Note the tensors that the model returns."""
        self._outputs = []
        if len(self.numbers) > MOST_NUMBERS:
            self.numbers.clear()
        for index, (x, placement) in enumerate(zip(outputs, forward.placements, strict=True)):
            if x.grad_fn is not None:
                self.numbers[sequence_number(x.grad_fn)] = index
            # The output of a single sample may have no axis left.
            where = placement or (of_one(x, 0) if forward.n == 1 else None)
            if where is not None:
                self._outputs.append((weakref.ref(x), where))
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

    def to_verify(self, *, is_over: bool) -> list[tuple[Tensor, Placement]]:
        """The outputs that are still alive and can be differentiated, for a pass that is still to come.

        Args:
            is_over: whether the backward pass through them is over, and another would count nothing.

        Raises:
            LifecycleError: if the model was not called, its pass is over, or the outputs are gone.
        """
        if is_over:
            raise LifecycleError(
                "verify goes before backward(), and the backward pass through the model's latest call is over: call the model "
                "again, then verify(loss), then loss.backward()"
            )
        alive = [(reference(), placement) for reference, placement in self._outputs]
        outputs = [(x, placement) for x, placement in alive if x is not None and x.requires_grad]
        if not alive or (not outputs and any(x is not None for x, _ in alive)):
            raise LifecycleError(
                "verify: the model was not called with a gradient in this block: call it inside, outside of torch.no_grad()"
            )
        if not outputs:
            raise LifecycleError(
                "verify: the model's outputs are gone: write outputs = model(inputs), and on the next line loss = "
                "loss_fn(outputs, targets), so that they are there until verify(loss) has seen them"
            )
        return outputs
