"""The exact Fisher in two parts: that of a model's last layer, which is cheap, and that of the layers before it.

For outputs ``f_n = M^T h_n + b``, the output gradients s of a sample, with ``sum_s s s^T = A_n``, give the gradients ``h_n s^T``
of the last layer's matrix and s of its bias. The sum of their squared norms is ``tr A_n (||h_n||^2 + 1)``, for which no s has to
be computed. The layers before depend only on ``B_n = M A_n M^T``, so any square roots of it will do, and as many as the layer
has inputs suffice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_secorder.likelihoods import LastLayer, Likelihood

# How many bytes the roots of all samples may take, and how many the output gradients that they are computed from at once.
MOST_OF_ROOTS, MOST_AT_ONCE = 2**28, 2**26

# Up to this many output gradients, a product of each with the matrix costs less than the memory traffic of the alternative.
FEW_CLASSES = 128


@dataclass(frozen=True)
class ExactByLastLayer:
    """The quantities that the two parts depend on.

    Attributes:
        traces: ``tr A_n``, ``[n]``.
        input_gradients: roots of ``B_n``, gradients of the last layer's inputs, ``[n, i]``, each of which takes a backward pass.
        count: how many there are.
        matrix: M, ``[i, c]``.
    """

    traces: Tensor
    input_gradients: Iterator[Tensor]
    count: int
    matrix: Tensor

    @classmethod
    def of(cls, likelihood: Likelihood, outputs: Tensor, last_layer: LastLayer) -> ExactByLastLayer:
        """The quantities for outputs ``[n, c]`` of a last layer."""
        seeds, (n, features) = likelihood.exact_passes(outputs), last_layer.inputs.shape
        # Fewer roots take a decomposition, which costs about as much as a few passes.
        pays = 2 * features <= seeds and n * features**2 * outputs.dtype.itemsize <= MOST_OF_ROOTS
        if pays:
            gradients = _fewest(likelihood, outputs, last_layer)
        elif seeds < FEW_CLASSES:
            gradients = (seed @ last_layer.matrix.T for seed in likelihood.exact_output_gradients(outputs))
        else:
            gradients = likelihood.exact_input_gradients(outputs, last_layer)
        traces = likelihood.curvature_traces(outputs)
        return cls(traces, gradients, min(seeds, features) if pays else seeds, last_layer.matrix)


def _fewest(likelihood: Likelihood, outputs: Tensor, last_layer: LastLayer) -> Iterator[Tensor]:
    """As many roots of each ``B_n`` as the last layer has inputs.

    With all roots as the rows of K, ``K^T K = B_n``. From K = Q R follows ``R^T R = B_n``, so the rows of R are roots, too.
    """
    seeds, features = likelihood.exact_passes(outputs), len(last_layer.matrix)
    step = max(1, MOST_AT_ONCE // (seeds * features * outputs.dtype.itemsize))
    found: list[Tensor] = []
    for start in range(0, len(outputs), step):
        rows = slice(start, start + step)
        part = LastLayer(last_layer.inputs[rows], last_layer.matrix)
        each = torch.stack([*likelihood.of_samples(rows).exact_input_gradients(outputs[rows], part)], 1)
        found.append(torch.linalg.qr(each, mode="r").R)
    return iter(torch.cat(found).unbind(1))
