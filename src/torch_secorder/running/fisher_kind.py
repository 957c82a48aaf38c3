"""Which Fisher an analysis is of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch_secorder.arguments import require_positive_int
from torch_secorder.errors import ArgumentError, ShapeError
from torch_secorder.graph.last_layer import last_linear_factors
from torch_secorder.likelihoods import LastLayer, Likelihood, likelihood
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
        self,
        outputs: Tensor,
        targets: Any,
        generator: torch.Generator,
        ranks: Ranks,
        *,
        differentiable: bool = False,
        axis: int = 0,
    ) -> tuple[int, Iterator[Tensor]]:
        """How many backward passes the trace takes, and the output gradient that each of them starts with.

        Ranks that hold the model together agree on both. With ``differentiable`` the gradients keep their own graph. The samples
        are on ``axis`` of the outputs, and of targets of their shape.

        Raises:
            ArgumentError: if the exact expectation takes more than ``max_passes``, or observed labels are missing.
            CoverageError: if other ranks need another number of passes.
        """
        product = None if self.num_samples is None else last_linear_factors(outputs)
        outputs = outputs if differentiable else outputs.detach()
        last_layer = None if product is None else LastLayer(*product)
        kind = self
        if axis:
            kind, outputs, targets = self._samples_first(outputs, targets, axis)
        count, gradients = kind._output_gradients(outputs, targets, ranks.common_generator(generator), last_layer)
        ranks.require_same(count, "their outputs take different numbers of backward passes; pad them to one shape")
        return count, (gradient.movedim(0, axis) for gradient in gradients) if axis else gradients

    def _samples_first(self, outputs: Tensor, targets: Any, axis: int) -> tuple[FisherKind, Tensor, Any]:
        """The same likelihood with the samples on axis 0: passes are counted, and taken apart, by the axes behind it."""
        if outputs.dim() <= axis:
            raise ShapeError(f"outputs of shape {tuple(outputs.shape)} have no axis {axis} that counts samples")
        kind, of_targets = self, axis
        if self.loss_type == "nll":
            classes = self.class_axis % outputs.dim()
            if classes == axis:
                raise ArgumentError(
                    f"class_axis={self.class_axis} for outputs of shape {tuple(outputs.shape)}, whose axis {axis} is the batch: "
                    "say with class_axis= where the classes are"
                )
            of_targets = axis - (classes < axis)
            kind = replace(self, class_axis=classes + (classes < axis))
        if isinstance(targets, Tensor) and targets.dim() > of_targets:
            targets = targets.movedim(of_targets, 0)
        return kind, outputs.movedim(axis, 0), targets

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
                    f"max_passes={self.max_passes:,}: pass num_samples=k for an unbiased estimate from k passes"
                )
            return passes, model.exact_output_gradients(outputs)
        sampled = model.sampled_output_gradients(outputs, self.num_samples, generator, last_layer)
        return min(passes, self.num_samples), sampled
