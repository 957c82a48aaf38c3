"""What the analysis of one batch found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch_secorder.arguments import Reduction
from torch_secorder.batch_axis.samples import BatchSamples
from torch_secorder.recording.sample_norms import SampleNorms


@dataclass(frozen=True)
class Batch:
    """One batch, analyzed.

    Attributes:
        samples: squared norms of its per-sample gradients.
        outputs: what the model returned, without its graph.
        random: whether the forward drew random numbers.
        where: where its samples are in the inputs, outputs and targets.
        fingerprint: a hash of the graph, equal for graphs of the same kind.
        reduction: how the loss combines samples, if that was determined.
        loss_inside: whether the model computes the loss itself, so that the outputs which the loss depends on have no row for
            each sample.
    """

    samples: SampleNorms
    outputs: Any
    random: bool
    where: BatchSamples
    fingerprint: int
    reduction: Reduction = "sum"
    loss_inside: bool = False
