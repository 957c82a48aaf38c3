"""The outputs of the model's calls that a loss depends on, for whoever asks for them before its backward pass."""

from __future__ import annotations

from collections.abc import Collection, Container

from torch import Tensor
from torch.autograd.graph import Node

from torch_secorder.autograd.roots import sequence_number
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.capture.model_run import Forward
from torch_secorder.errors import LifecycleError
from torch_secorder.recording.model_outputs import Output


def outputs_of_loss(
    calls: Collection[tuple[Forward, list[Output]]], loss: Tensor, *, counts_again: bool, same_samples: bool
) -> tuple[int, list[tuple[Tensor, Placement]]]:
    """The number of samples, and the outputs that a loss depends on.

    Args:
        calls: the latest calls of the model, each with its outputs.
        loss: the loss, whose backward pass is still to come.
        counts_again: whether another backward pass through the same call counts its samples again.
        same_samples: whether several calls of the model in one pass are of the same samples.

    Raises:
        LifecycleError: if the model was not called, the loss depends on none of its outputs or on those of several calls, its
            pass is over, or some outputs are gone.
    """
    if not calls:
        raise LifecycleError(
            "verify: the model was not called with a gradient in this block: call it inside, outside of torch.no_grad()"
        )
    reached = _reached(loss, {output.number for _, outputs in calls for output in outputs})
    used = [(forward, [output for output in outputs if output.number in reached]) for forward, outputs in calls]
    used = [(forward, outputs) for forward, outputs in used if outputs]
    if not used:
        raise LifecycleError(
            "verify: the loss doesn't depend on the outputs of a call of the model in this block: pass the loss that is "
            "computed from them"
        )
    if not counts_again and any(forward.last_pass is not None for forward, _ in used):
        raise LifecycleError(
            "verify goes before backward(), and the backward pass through these outputs of the model is over: call the model "
            "again, then verify(loss), then loss.backward()"
        )
    if len(used) > 1 and not same_samples:
        raise LifecycleError(
            f"verify: the loss depends on the outputs of {len(used)} calls of the model, whose samples are not said to be "
            'the same: pass repeated_calls="same" if row n of all of them belongs to one sample, or verify the loss of one '
            "call, in a backward pass of its own"
        )
    alive = [(output.reference(), output.placement) for _, outputs in used for output in outputs]
    outputs = [(x, placement) for x, placement in alive if x is not None]
    if len(outputs) < len(alive):
        raise LifecycleError(
            "verify: the model's outputs are gone: write outputs = model(inputs), and on the next line loss = "
            "loss_fn(outputs, targets), so that they are there until verify(loss) has seen them"
        )
    # A call may return what it was given, which an earlier call has returned.
    return used[0][0].n or 0, list({id(x): (x, placement) for x, placement in outputs}.values())


def _reached(loss: Tensor, numbers: Container[int]) -> set[int]:
    """Those of these nodes, by their numbers, that a loss reaches without passing through another of them."""
    found, seen = set[int](), {loss.grad_fn}
    stack: list[Node | None] = [loss.grad_fn]
    while stack:
        if (node := stack.pop()) is None:
            continue
        if (number := sequence_number(node)) in numbers:
            found.add(number)
            continue
        children = {child for child, _ in node.next_functions} - seen
        seen |= children
        stack += children
    return found
