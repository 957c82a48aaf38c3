"""Which Fisher an analysis computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from torch_secorder.arguments import require_positive_int
from torch_secorder.errors import ArgumentError
from torch_secorder.graph.last_layer import last_linear_factors
from torch_secorder.likelihoods import LastLayer, Likelihood, axis_of_classes, likelihood, warn_of_probabilities
from torch_secorder.model.ranks import Ranks
from torch_secorder.running.by_last_layer import ExactByLastLayer
from torch_secorder.running.causal import causal_labels, shifted, unshifted
from torch_secorder.running.counted import counted_labels, has_mask


@dataclass(frozen=True)
class FisherKind:
    """Which Fisher an analysis computes, if it is not the empirical one.

    Attributes:
        labels: "model" for labels of the model's own prediction, "observed" for the given targets.
        num_samples: None for the exact expectation over the model's labels, k for an estimate from k backward passes.
        shift: whether the outputs at one position predict the label at the next.
    """

    loss_type: str = "nll"
    labels: str = "model"
    num_samples: int | None = None
    ignore_index: int = -100
    class_axis: int = 1
    max_passes: int = 10_000
    shift: bool = False

    def __post_init__(self) -> None:
        for name in ("ignore_index", "class_axis"):
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int):
                raise ArgumentError(f"{name} must be an int, not {value!r}")
        require_positive_int("max_passes", self.max_passes)
        if not isinstance(self.shift, bool):
            raise ArgumentError(f"shift must be True or False, not {self.shift!r}")
        if self.shift and self.loss_type != "nll":
            raise ArgumentError(f'shift=True is for loss_type="nll", labels that are tokens, not {self.loss_type!r}')

    def output_gradients(
        self, outputs: Tensor, targets: Any, generator: torch.Generator, ranks: Ranks, *, differentiable: bool = False
    ) -> tuple[int, Iterator[Tensor]]:
        """How many backward passes the trace takes, and the output gradient that each of them starts with.

        Ranks that hold the model together agree on both. With ``differentiable`` the gradients keep their own graph.

        Raises:
            ArgumentError: if the exact expectation takes more than ``max_passes``, or observed labels are missing.
            CoverageError: if other ranks need another number of passes.
        """
        warn_of_probabilities(outputs, self.loss_type)
        product = None if self.num_samples is None else last_linear_factors(outputs)
        outputs = outputs if differentiable else outputs.detach()
        last_layer = None if product is None else LastLayer(product[0].detach(), product[1])
        generator = ranks.common_generator(generator)
        targets = self._causal(targets)
        if self.loss_type == "nll":
            self._require_axis_told(outputs, targets)
        targets = self._counted(outputs, targets)
        if self.shift:
            predicting, labels, axis = shifted(outputs, targets, self.class_axis)
            count, gradients = self._output_gradients(predicting, labels, generator, None)
            gradients = unshifted(gradients, axis)
        else:
            count, gradients = self._output_gradients(outputs, targets, generator, last_layer)
        ranks.require_same(count, "their outputs take different numbers of backward passes; pad them to one shape")
        return count, gradients

    def by_last_layer(self, outputs: Tensor, targets: Any) -> ExactByLastLayer | None:
        """The exact expectation in two parts, for outputs ``[n, ..., c]`` that a product with a matrix made; None for others."""
        if self.labels != "model" or self.num_samples is not None or (product := last_linear_factors(outputs)) is None:
            return None
        if self.loss_type == "nll" and axis_of_classes(outputs, self.class_axis) != outputs.dim() - 1:
            return None
        if {outputs.dtype, *(factor.dtype for factor in product)} not in ({torch.float32}, {torch.float64}):
            return None
        outputs, layer = outputs.detach(), LastLayer(product[0].detach(), product[1])
        targets, rows = self._labels_of_rows(outputs, targets), outputs.flatten(0, -2)
        model = likelihood(self.loss_type, rows, targets, ignore_index=self.ignore_index)
        return ExactByLastLayer.of(model, rows, layer, len(rows) // len(outputs))

    def _labels_of_rows(self, outputs: Tensor, targets: Any) -> Any:
        """The labels of all positions, ``[rows]``, which are ``ignore_index`` where nothing counts; None if all do."""
        if self.loss_type != "nll":
            return None
        labels = self._counted(outputs, self._causal(targets))
        if self.shift:
            predicting, labels, _ = shifted(outputs, labels, self.class_axis)
            if not isinstance(labels, Tensor):
                labels = torch.zeros(predicting.shape[:2], dtype=torch.long, device=outputs.device)
            labels = pad(labels, (0, 1), value=self.ignore_index)
        if not isinstance(labels, Tensor):
            return labels
        self._likelihood(outputs, labels)  # It refuses labels that do not fit the outputs.
        return labels.flatten()

    def _causal(self, targets: Any) -> Any:
        """The targets of a batch; those of a causal language model are the labels of all of its tokens."""
        takes = self.shift and (self.labels == "observed" or not has_mask(targets))
        return causal_labels(targets, self.ignore_index) if takes else targets

    def _counted(self, outputs: Tensor, targets: Any) -> Any:
        """The targets that the likelihood takes: for labels of the model's own they say which positions count."""
        if self.loss_type != "nll" or self.labels != "model":
            return targets
        return counted_labels(targets, outputs, self.class_axis, self.ignore_index)

    def _likelihood(self, outputs: Tensor, targets: Any) -> Likelihood:
        return likelihood(self.loss_type, outputs, targets, ignore_index=self.ignore_index, class_axis=self.class_axis)

    def _require_axis_told(self, outputs: Tensor, targets: Any) -> None:
        """Raise if nothing shows whether three axes are (samples, positions, classes), as language models have them, or not."""
        told = isinstance(targets, Tensor) and outputs.shape[1] != outputs.shape[-1]
        if outputs.dim() == 3 and self.class_axis == 1 and not told:
            raise ArgumentError(
                f"outputs of shape {tuple(outputs.shape)} may have their classes on either axis: pass class_axis=-1 for "
                "(samples, positions, classes), as language models return them, or class_axis=-2 for (samples, classes, "
                "positions)"
            )

    def _output_gradients(
        self, outputs: Tensor, targets: Any, generator: torch.Generator, last_layer: LastLayer | None
    ) -> tuple[int, Iterator[Tensor]]:
        model = self._likelihood(outputs, targets)
        if self.labels == "observed":
            if not isinstance(targets, Tensor):
                raise ArgumentError(
                    "observed labels need targets that are a tensor: where batches are mappings, the name of the entry that has "
                    "them is passed to fisher_report as labels="
                )
            return 1, iter([model.observed_output_gradient(outputs, targets)])
        passes = model.exact_passes(outputs)
        if self.num_samples is None:
            if passes > self.max_passes:
                raise ArgumentError(
                    f"the exact Fisher of outputs of shape {tuple(outputs.shape)} takes {passes:,} backward passes, more than "
                    f"max_passes={self.max_passes:,}: pass num_samples=k for an unbiased estimate from k passes, to "
                    f'fisher_report together with fisher="sampled", or max_passes={passes} to take them all'
                )
            return passes, model.exact_output_gradients(outputs)
        sampled = model.sampled_output_gradients(outputs, self.num_samples, generator, last_layer)
        return min(passes, self.num_samples), sampled
