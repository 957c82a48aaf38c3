"""The exact Fisher in two parts: that of a model's last layer, which is cheap, and that of the layers before it.

For outputs ``f_n = M^T h_n + b``, the output gradients s of a sample, with ``sum_s s s^T = A_n``, give the gradients ``h_n s^T``
of the last layer's matrix and s of its bias. The sum of their squared norms is ``tr A_n (||h_n||^2 + 1)``, for which no s has to
be computed. The layers before depend only on ``B_n = M A_n M^T``, so any square roots of it will do, and as many as the layer
has inputs suffice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torch_secorder.likelihoods import LastLayer, Likelihood

# How many bytes the roots of all samples may take, and how many the output gradients that they are computed from at once.
MOST_OF_ROOTS, MOST_AT_ONCE = 2**28, 2**26

# Up to this many output gradients, a product of each with the matrix costs less than the memory traffic of the alternative.
FEW_CLASSES = 128


@dataclass(frozen=True)
class ExactByLastLayer:
    """The quantities that the two parts depend on. A row is a sample, or a position of one; a sample's rows are neighbors.

    Attributes:
        traces: ``tr A`` of every row, ``[rows]``.
        roots: roots of ``B`` of every row, gradients of the last layer's inputs, ``[rows, i]``.
        root_count: how many there are.
        matrix: M, ``[i, c]``.
        positions: how many rows a sample has.
    """

    traces: Tensor
    roots: Iterator[Tensor]
    root_count: int
    matrix: Tensor
    positions: int = 1

    @classmethod
    def of(cls, likelihood: Likelihood, outputs: Tensor, last_layer: LastLayer, positions: int = 1) -> ExactByLastLayer:
        """The quantities for outputs ``[rows, c]`` of a last layer."""
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
        return cls(traces, gradients, min(seeds, features) if pays else seeds, last_layer.matrix, positions)

    @cached_property
    def _counted(self) -> list[int]:
        """The positions at which some sample's outputs count, or one of the others: their roots are zero."""
        counted = self.traces.view(-1, self.positions).ne(0).any(0)
        return counted.nonzero().flatten().tolist() or [0]

    @property
    def count(self) -> int:
        """How many passes begin before the last layer."""
        return self.root_count * (1 if self.positions == 1 else len(self._counted))

    @property
    def input_gradients(self) -> Iterator[Tensor]:
        """The gradients, ``[rows, i]``, with which the passes begin before the last layer."""
        if self.positions == 1:
            yield from self.roots
            return
        for root in self.roots:
            for position in self._counted:
                yield at_position(root, position, self.positions)

    @property
    def own_gradients(self) -> Iterator[Tensor]:
        """Gradients of the outputs, ``[rows, c]``, that give the last layer's own part."""
        return stand_ins(self.traces, self.matrix.shape[1], self.positions)


def at_position(values: Tensor, position: int, positions: int) -> Tensor:
    """``[rows, ...]`` with zeros at all positions of a sample but one."""
    found = torch.zeros_like(values)
    found[position::positions] = values[position::positions]
    return found


def stand_ins(sizes: Tensor, classes: int, positions: int = 1) -> Iterator[Tensor]:
    """Output gradients ``[rows, c]`` that stand for all those with these sums of squares, ``[rows]``, in a product's own norms.

    The norms depend on nothing else, if each of the gradients that they stand for is one of a single position. So those of
    different positions must not mix: they are orthogonal, as many at a time as there are classes.
    """
    for first in range(0, positions, classes):
        here = torch.arange(first, min(first + classes, positions), device=sizes.device)
        gradient = sizes.new_zeros(len(sizes) // positions, positions, classes)
        gradient[:, here, here - first] = sizes.view(-1, positions)[:, here].sqrt()
        yield gradient.flatten(0, 1)


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
