"""The interface of likelihoods: output gradients whose squares add up to the curvature, exactly or in expectation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LastLayer:
    """The product that ends a model: its outputs are ``inputs @ matrix``, plus a bias if there is one.

    Attributes:
        inputs: ``[n, i]``.
        matrix: ``[i, c]``.
    """

    inputs: Tensor
    matrix: Tensor

    def influence(self, p: Tensor) -> Tensor:
        """How strongly each label of each sample acts on the layers before: ``||D_n M (e_c - p_n)||^2``, ``[n, c]``.

        D_n selects the layer's inputs that are not zero, since a ReLU or dropout lets no gradient through to the others.
        """
        weight, active = self.matrix.T.to(p.dtype), self.inputs.to(p.dtype).sign().abs()
        sizes = (weight.square() @ active.T).T  # ||D M_c||^2
        mixed = (weight @ (active * (p @ weight)).T).T  # M_c . D m, with m = sum_c p_c M_c
        found = sizes - 2 * mixed + (p * mixed).sum(1, keepdim=True)
        # The difference has no digits left for a class that is nearly certain. Written as sum_j p_j D (M_c - M_j), its norm
        # cannot exceed 2 (1 - p_c) max_j ||D M_j||.
        return found.clamp(min=0).minimum(4 * (1 - p).square() * sizes.amax(1, keepdim=True))


class Likelihood(ABC):
    """A model of the targets, given outputs whose axis 0 is the batch."""

    @abstractmethod
    def exact_passes(self, outputs: Tensor) -> int:
        """How many gradients :meth:`exact_output_gradients` yields, each of which takes a backward pass."""

    @abstractmethod
    def exact_output_gradients(self, outputs: Tensor) -> Iterator[Tensor]:
        """Gradients s, shaped like the outputs, with ``sum_s s s^T = A_n`` for every sample."""

    @abstractmethod
    def exact_input_gradients(self, outputs: Tensor, last_layer: LastLayer) -> Iterator[Tensor]:
        """``s M^T`` for all exact gradients s of outputs ``[n, c]``: gradients of the last layer's inputs ``[n, i]``, unordered.

        They are computed without a product with M, which would cost as much as the layer itself for each class.
        """

    def of_samples(self, rows: slice) -> Likelihood:
        """The same likelihood for a part of the batch."""
        return self

    @abstractmethod
    def curvature_traces(self, outputs: Tensor) -> Tensor:
        """``tr A_n = sum_s ||s_n||^2`` of every sample, ``[n]``."""

    def sampled_output_gradients(
        self, outputs: Tensor, k: int, generator: torch.Generator, last_layer: LastLayer | None = None
    ) -> Iterator[Tensor]:
        """At most k random gradients with ``E[sum_s s s^T] = A_n``; the exact ones where k of them suffice.

        Args:
            outputs: the model's outputs.
            k: the number of gradients.
            generator: the source of randomness.
            last_layer: the product that made the outputs; knowing it may lower the variance.
        """
        if k >= self.exact_passes(outputs):
            return self.exact_output_gradients(outputs)
        return self._sampled_output_gradients(outputs, k, generator, last_layer)

    @abstractmethod
    def _sampled_output_gradients(
        self, outputs: Tensor, k: int, generator: torch.Generator, last_layer: LastLayer | None
    ) -> Iterator[Tensor]:
        """K random gradients, for a k below the number of exact ones."""

    @abstractmethod
    def observed_output_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The gradient of ``-log p(targets | outputs)``.

        Raises:
            ArgumentError: for targets that the likelihood gives no meaning to.
        """


def random_signs(shape: tuple[int, ...] | torch.Size, like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent +1 and -1 with equal probability, on the device and in the dtype of ``like``."""
    bits = torch.randint(2, tuple(shape), generator=generator, device=generator.device)
    return (2 * bits - 1).to(like.device, like.dtype)
