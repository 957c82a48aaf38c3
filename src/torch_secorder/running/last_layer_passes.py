"""Backward passes of a model that ends in a Linear layer: one pass for that layer, and all others begin before it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from torch_secorder.recording.sample_norms import SampleNorms
from torch_secorder.running.run import HookedForward


def norms_by_last_layer(
    run: HookedForward, outputs: Tensor, inputs: Tensor, sizes: Tensor, input_gradients: Iterable[Tensor], count: int
) -> SampleNorms:
    """The sum of the squared norms for several output gradients, with the last layer's part from one pass.

    Args:
        run: the model's forward.
        outputs: of the last layer, ``[n, c]``.
        inputs: of the last layer, ``[n, i]``, with their graph.
        sizes: the sum of the squared sizes of each sample's output gradients, ``[n]``.
        input_gradients: those gradients where they arrive at the inputs, or others with the same sum of squares.
        count: how many there are.
    """
    # One output gradient of the size of all of them stands for all, since the layer's own norms depend on nothing else.
    seed = torch.zeros_like(outputs)
    seed[:, 0] = sizes.sqrt()
    own = run.backward(outputs, seed, last=False, end=inputs)
    passes = (
        run.backward(inputs, gradient, last=number == count) for number, gradient in enumerate(input_gradients, start=1)
    )
    total = reduce(SampleNorms.plus, passes, own)
    return replace(total, reached=own.reached | total.reached, rules={**total.rules, **own.rules})
