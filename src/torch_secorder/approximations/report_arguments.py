"""The arguments of reports as a type, for functions that hand them on."""

from __future__ import annotations

from typing import TypedDict

import torch

from torch_secorder.arguments import ErrorOf, Fisher, LossType, Reduction
from torch_secorder.batch_axis.told import BatchAxis, NSamples, SampleOf
from torch_secorder.model.selection import Selection
from torch_secorder.running.placing import Device


class ReportArguments(TypedDict, total=False):
    """The arguments of :func:`~torch_secorder.fisher_report` that may be left out, without ``by``."""

    fisher: Fisher
    num_samples: int | None
    loss_type: LossType
    max_batches: int | None
    max_samples: int | None
    rtol: float | None
    rtol_of: ErrorOf
    progress: bool
    verify: bool
    reduction: Reduction | None
    parameters: Selection
    labels: str | None
    batch_axis: BatchAxis
    n_samples: NSamples
    sample_of: SampleOf
    ignore_index: int
    class_axis: int
    shift: bool
    generator: torch.Generator | None
    max_passes: int
    max_memory: int | None
    device: Device
