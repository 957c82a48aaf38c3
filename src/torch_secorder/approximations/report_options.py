"""The arguments of fisher_results and fisher_report, checked before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_args

import torch

from torch_secorder.approximations.precision import Precision
from torch_secorder.arguments import ErrorOf, Fisher, LossType, Reduction, require_choice, require_positive_int
from torch_secorder.batch_axis.told import BatchAxis, NSamples, SampleOf
from torch_secorder.errors import ArgumentError
from torch_secorder.model.selection import Selection
from torch_secorder.recording.quantities import Keeps
from torch_secorder.running.fisher_kind import FisherKind
from torch_secorder.running.placing import Device


@dataclass(frozen=True)
class ReportOptions:
    """The arguments of :func:`fisher_results`, which has their meaning; ``keeps`` are the quantities that it keeps."""

    fisher: Fisher = "empirical"
    num_samples: int | None = None
    loss_type: LossType = "nll"
    max_batches: int | None = None
    max_samples: int | None = None
    rtol: float | None = None
    rtol_of: ErrorOf = "total"
    progress: bool = True
    verify: bool = True
    reduction: Reduction | None = None
    parameters: Selection = "trainable"
    labels: str | None = None
    batch_axis: BatchAxis = None
    n_samples: NSamples = None
    sample_of: SampleOf = None
    ignore_index: int = -100
    class_axis: int = 1
    shift: bool = False
    generator: torch.Generator | None = None
    max_passes: int = 10_000
    max_memory: int | None = None
    device: Device = None
    ids: str | int | Callable[[Any], Any] | None = None
    keeps: Keeps = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_choice("fisher", self.fisher, ("empirical", "exact", "sampled", "observed"))
        require_choice("reduction", self.reduction, (None, "mean", "sum"))
        if self.num_samples is not None and self.fisher != "sampled":
            raise ArgumentError(f'num_samples is for fisher="sampled", not fisher={self.fisher!r}')
        if self.shift and self.fisher == "empirical":
            raise ArgumentError(
                'shift=True is for labels of a likelihood, fisher="observed", "sampled" or "exact"; the loss that '
                'fisher="empirical" takes has to shift its labels itself, as torch_secorder.losses.causal_lm does'
            )
        for name in ("max_batches", "max_samples", "num_samples"):
            if getattr(self, name) is not None:
                require_positive_int(name, getattr(self, name))
        require_choice("rtol_of", self.rtol_of, get_args(ErrorOf))
        if self.rtol is None and self.rtol_of != "total":
            raise ArgumentError(
                f"rtol_of={self.rtol_of!r} says whose error ends the run: pass rtol=, the error to reach, too"
            )
        _ = self.precision  # checked before anything runs

    @property
    def precision(self) -> Precision | None:
        """What is to be reached, if that ends the run."""
        return None if self.rtol is None else Precision(self.rtol, self.rtol_of)

    @property
    def kind(self) -> FisherKind:
        """Which Fisher, unless it is the empirical one."""
        labels = "observed" if self.fisher == "observed" else "model"
        draws = (self.num_samples or 1) if self.fisher == "sampled" else None
        return FisherKind(
            self.loss_type, labels, draws, self.ignore_index, self.class_axis, self.max_passes, self.shift
        )
