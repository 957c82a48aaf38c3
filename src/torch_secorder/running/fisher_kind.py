"""Which Fisher an analysis is of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_secorder.arguments import require_positive_int
from torch_secorder.errors import ArgumentError
from torch_secorder.graph.last_layer import last_linear_factors
from torch_secorder.likelihoods import LastLayer, Likelihood, likelihood, warn_of_probabilities
from torch_secorder.model.ranks import Ranks


@dataclass(frozen=True)
class FisherKind:
    """Which Fisher, for everything but the empirical one.

    Attributes:
        labels: "model" for labels of the model's own prediction, "observed" for the given targets.
        num_samples: None for the exact expectation over the model's labels, k for an estimate from k backward passes.
    """

    loss_type: str = "nll"
    labels: str = "model"
    num_samples: int | None = None
    ignore_index: int = -100
    class_axis: int = 1
    max_passes: int = 10_000

    def __post_init__(self) -> None:
        for name in ("ignore_index", "class_axis"):
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int):
                raise ArgumentError(f"{name} must be an int, not {value!r}")
        require_positive_int("max_passes", self.max_passes)

    def output_gradients(
        self, outputs: Tensor, targets: Any, generator: torch.Generator, ranks: Ranks, *, differentiable: bool = False
    ) -> tuple[int, Iterator[Tensor]]:
        """How many backward passes the trace takes, and the output gradient that each of them starts with.

        Ranks that hold the model together agree on both. With ``differentiable`` the gradients keep their own graph.

        Raises:
            ArgumentError: if the exact expectation takes more than ``max_passes``, or observed labels are missing.
            CoverageError: if other ranks need another number of passes.
        """
        if self.loss_type == "nll":
            warn_of_probabilities(outputs)
        product = None if self.num_samples is None else last_linear_factors(outputs)
        outputs = outputs if differentiable else outputs.detach()
        last_layer = None if product is None else LastLayer(*product)
        count, gradients = self._output_gradients(outputs, targets, ranks.common_generator(generator), last_layer)
        ranks.require_same(count, "their outputs take different numbers of backward passes; pad them to one shape")
        return count, gradients

    def _output_gradients(
        self, outputs: Tensor, targets: Any, generator: torch.Generator, last_layer: LastLayer | None
    ) -> tuple[int, Iterator[Tensor]]:
        model: Likelihood = likelihood(
            self.loss_type, outputs, targets, ignore_index=self.ignore_index, class_axis=self.class_axis
        )
        if self.labels == "observed":
            if not isinstance(targets, Tensor):
                raise ArgumentError('labels="observed" needs targets')
            return 1, iter([model.observed_output_gradient(outputs, targets)])
        passes = model.exact_passes(outputs)
        if self.num_samples is None:
            if passes > self.max_passes:
                raise ArgumentError(
                    f"the exact Fisher of outputs of shape {tuple(outputs.shape)} takes {passes:,} backward passes, more than "
                    f"max_passes={self.max_passes:,}: pass num_samples=k for an unbiased estimate from k passes, "
                    'to fisher_report together with fisher="sampled"'
                )
            return passes, model.exact_output_gradients(outputs)
        sampled = model.sampled_output_gradients(outputs, self.num_samples, generator, last_layer)
        return min(passes, self.num_samples), sampled
