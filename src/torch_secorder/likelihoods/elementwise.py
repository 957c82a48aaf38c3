"""Likelihoods with one independent variable for each output element."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_secorder.errors import ArgumentError, ShapeError
from torch_secorder.likelihoods.output_gradients import LastLayer, Likelihood, random_signs


@dataclass(frozen=True)
class Elementwise(Likelihood):
    """One independent variable for each output element, so that A_n is diagonal.

    Random signs on the square root of a diagonal A are unbiased for a trace, ``E[r r^T] = I``, and vary less than
    drawing the variable itself.

    Attributes:
        mean: from the outputs to the mean of each element's variable.
        root: from the outputs to the square root of A_n's diagonal.
    """

    mean: Callable[[Tensor], Tensor]
    root: Callable[[Tensor], Tensor]

    def exact_passes(self, outputs: Tensor) -> int:
        return math.prod(outputs.shape[1:])

    def exact_output_gradients(self, outputs: Tensor) -> Iterator[Tensor]:
        root = self.root(outputs).reshape(len(outputs), -1)
        for element in range(root.shape[1]):
            gradient = torch.zeros_like(root)
            gradient[:, element] = root[:, element]
            yield gradient.view(outputs.shape)

    def exact_input_gradients(self, outputs: Tensor, last_layer: LastLayer) -> Iterator[Tensor]:
        return map(torch.outer, self.root(outputs).unbind(1), last_layer.matrix.unbind(1))

    def curvature_traces(self, outputs: Tensor) -> Tensor:
        return self.root(outputs).square().flatten(1).sum(1)

    def _sampled_output_gradients(
        self, outputs: Tensor, k: int, generator: torch.Generator, last_layer: LastLayer | None
    ) -> Iterator[Tensor]:
        root = self.root(outputs) / math.sqrt(k)
        return (root * random_signs(outputs.shape, outputs, generator) for _ in range(k))

    def observed_output_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.shape != outputs.shape:
            raise ShapeError(f"targets of shape {tuple(targets.shape)} for outputs of shape {tuple(outputs.shape)}")
        if targets.is_complex():
            raise ArgumentError(f"targets must be real numbers, not {targets.dtype}")
        return self.mean(outputs) - targets.to(outputs.dtype)


# Loss type -> its likelihood. A further one is a row here.
ELEMENTWISE = {
    "bce": Elementwise(mean=torch.sigmoid, root=lambda f: (torch.sigmoid(f) * torch.sigmoid(-f)).sqrt()),
    "mse": Elementwise(mean=lambda f: f, root=torch.ones_like),
    "poisson": Elementwise(mean=torch.exp, root=lambda f: (f / 2).exp()),
}
