"""Backward passes of a model that ends in a Linear layer: one pass for that layer, and all others begin before it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import reduce

from torch import Tensor

from torch_secorder.recording.sample_norms import SampleNorms
from torch_secorder.running.run import HookedForward


def norms_by_last_layer(
    run: HookedForward,
    outputs: Tensor,
    inputs: Tensor,
    own_gradients: Iterable[Tensor],
    input_gradients: Iterable[Tensor],
    count: int,
) -> SampleNorms:
    """The sum of the squared norms for several output gradients, with the last layer's part from one pass, or from few.

    Args:
        run: the model's forward.
        outputs: of the last layer, ``[n, ..., c]``.
        inputs: of the last layer, ``[rows, i]``, with their graph.
        own_gradients: gradients of the outputs, ``[rows, c]``, that give the last layer's part.
        input_gradients: the output gradients where they arrive at the inputs, or others with the same sum of squares.
        count: how many of these there are.
    """
    ends = (run.backward(outputs, one.view_as(outputs), last=False, end=inputs) for one in own_gradients)
    own = reduce(SampleNorms.plus, ends)
    passes = (
        run.backward(inputs, gradient, last=number == count) for number, gradient in enumerate(input_gradients, start=1)
    )
    total = reduce(SampleNorms.plus, passes, own)
    return replace(total, reached=own.reached | total.reached, rules={**total.rules, **own.rules})
