"""Labels through nodes that show nothing of what they do: they are called by themselves, with numbers that tell.

A Python function's backward may be anything. It is called alone with numbers of ours, and what it does with these is compared, on
its device, with what it has to do for a rule to apply. If it does anything else, the rule does not apply. Writes into a part of a
tensor are asked in ``written``, and views of memory in ``strided``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import Node

from torch_secorder.autograd.double_precision import widest_dtype
from torch_secorder.autograd.guard import RunsOthersCodeError
from torch_secorder.autograd.kept_values import hides_state, vjp_in_look
from torch_secorder.autograd.nodes import is_others_function, outputs_of
from torch_secorder.autograd.opaque import runs_others_code
from torch_secorder.batch_axis.label_rules.registry import PYTHON_FUNCTION, Answer, At, rule
from torch_secorder.batch_axis.labels import NOBODY, SEVERAL, Labels, joined, joined_along

# The length of the block of random numbers that gradients repeat. It is prime, so that no axis lines up with it.
BLOCK = 65_521
# How many numbers a function is given in all its calls, at most.
LARGEST_QUESTION = 2**24
# By how much a row may change with what the other rows are, relative to the largest number: rounding at most.
FORGIVEN = 1e-2


def random_numbers(output: Any) -> Tensor:
    """A gradient for an output: random numbers from 1 to 2."""
    numel = math.prod(output.shape)
    block = _block(min(numel, BLOCK), output.device, output.dtype)
    return block.repeat(-(-numel // len(block)))[:numel].view(tuple(output.shape))


@lru_cache(32)  # The host would wait for a copy to a device in each step.
def _block(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    block = torch.rand(size, generator=generator, dtype=torch.float32, device="cpu") + 1
    return block.to(device, dtype)


def mark_of(node: Any) -> Tensor | None:
    """What tells nodes that move entries in one way from those that do it in another: a one, and a number for each input.

    The node is called with a product of random numbers, one for each index along each axis. What each input gets is summed, with
    other products for weights. As polynomials in these numbers, such sums are different for any two linear maps. The result is
    None if the node's output is no plain tensor of real numbers, or if the node gives nothing.
    """
    whole = outputs_of(node)[0]
    if not whole.dtype.is_floating_point or whole.is_nested_tensor:
        return None
    given = torch.ones((), dtype=whole.dtype, device=whole.device)
    for axis, size in enumerate(whole.shape):
        given = given[..., None] * _weights(2 * axis, size, whole.device, whole.dtype)
    found = [_weighted_sum(x) for x in vjp_in_look(node, [given]) if x is not None]
    return torch.stack([torch.ones_like(found[0]), *found]) if found else None


def _weighted_sum(x: Tensor) -> Tensor:
    x = x.to(widest_dtype(x.device))
    for axis in reversed(range(x.dim())):
        x = x @ _weights(2 * axis + 1, x.shape[axis], x.device, x.dtype)
    return x


@lru_cache(64)  # The host would wait for a copy to a device in each step.
def _weights(seed: int, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random numbers from 1 to 2, others for each seed."""
    numbers = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu") + 1
    return numbers.to(device, dtype)


def may_be_called(node: Node) -> bool:
    """Whether a Python function may be called to know what it does: one that keeps what can be copied, and calls no modules."""
    return is_others_function(node) and not hides_state(node) and not runs_others_code(node)


def _of_rows(node: Any) -> Sequence[Tensor] | None:
    """For each input of a node from which row of the outputs' gradients each row of the input's gradient comes.

    The node is called with some rows loud and the others silent, as often as it takes to tell any row from any other. Rows are
    NOBODY's where nothing arrives, and SEVERAL's where more than one row has a part in them.
    """
    outputs = outputs_of(node)
    counts = {tuple(output.shape)[:1] for output in outputs}
    plain = all(output.dtype.is_floating_point and not output.is_nested_tensor for output in outputs)
    count = sum(counts.pop(), start=0)
    if not plain or counts or count < 2:
        return None
    number = torch.arange(count, device=outputs[0].device)
    digits = torch.stack([number // 2**place % 2 for place in range((count - 1).bit_length())])
    if 2 * len(digits) * sum(math.prod(output.shape) for output in outputs) > LARGEST_QUESTION:
        return None
    loud = torch.stack([digits == 0, digits == 1], 1).flatten(0, 1)
    given = [random_numbers(output) for output in outputs]
    try:
        together = vjp_in_look(node, given)
        answers = [vjp_in_look(node, [x * _along(rows, x) for x in given]) for rows in loud]
    except RunsOthersCodeError:
        return None
    columns = zip(together, *answers, strict=True)
    return [_origins(whole, several, loud) for whole, *several in columns]


def _origins(whole: Tensor | None, answers: Sequence[Tensor | None], loud: Tensor) -> Tensor:
    """From which row each row of one input's gradient comes.

    Args:
        whole: the gradient if all rows are loud.
        answers: the gradients if only the rows of each set are loud: those whose number has 0, or 1, in each of its digits.
        loud: the sets, ``[2 * digits, rows]``.
    """
    if whole is None and all(one is None for one in answers):
        return torch.full((1,), NOBODY, device=loud.device)
    there = [one for one in answers if one is not None and whole is not None and one.shape == whole.shape]
    if whole is None or not whole.numel() or not whole.dim() or len(there) < len(answers):
        return torch.full((1,), SEVERAL, device=loud.device)
    parts = torch.stack(there)
    heard = parts.reshape(len(parts), len(whole), -1).ne(0).any(2)
    zero, one = heard[::2], heard[1::2]
    unit = 2 ** torch.arange(len(one), device=one.device)
    origin = (one * unit[:, None]).sum(0)
    silent = ~heard.any(0)
    clear = ((zero ^ one).all(0) | silent) & (origin < loud.shape[1])
    expected = whole * loud[:, origin.clamp(max=loud.shape[1] - 1)].reshape(len(parts), -1, *[1] * (whole.dim() - 1))
    clear = clear & ((parts - expected).abs().max() <= FORGIVEN * whole.abs().max())
    return torch.where(clear, torch.where(silent, NOBODY, origin), SEVERAL)


def _along(loud: Tensor, x: Tensor) -> Tensor:
    """A number for each row as a tensor that broadcasts along another one's rows."""
    return loud.to(x.device, x.dtype).view(-1, *[1] * (x.dim() - 1))


@rule(PYTHON_FUNCTION, asks=_of_rows, needs_first=False)
def _row_by_row(at: At) -> Answer | None:
    """A node that was seen to take its rows one by one."""
    if not at.indices:
        return None
    found: Labels | None = None
    for one in at.labels:
        found = found if one is None else joined(found, joined_along(one, range(1, one.ndim)).reshape(-1))
    assert found is not None
    found = np.broadcast_to(found, at.shapes[0][:1])
    answer: list[Labels | None] = []
    for shape, origins in zip(at.inputs, at.indices, strict=True):
        rows = np.full(1, SEVERAL) if origins is None else origins.numpy()
        own = np.where(rows < 0, rows, found[rows.clip(0)])
        # There is one for all rows where nothing arrives, or nothing is known.
        answer.append(own.reshape(-1, *[1] * (len(shape) - 1)) if shape and len(own) in (1, shape[0]) else None)
    return answer
