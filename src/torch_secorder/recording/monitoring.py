"""What a monitor watches and how: its checked arguments, and what is known about the model from one block to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from torch_secorder.arguments import (
    MonitorFisher,
    OnError,
    Reduction,
    RepeatedCalls,
    loss_scale_value,
    require_choice,
    require_max_memory,
    require_positive_int,
)
from torch_secorder.batch_axis.knowledge import ModelKnowledge, knowledge_of
from torch_secorder.batch_axis.told import BatchAxis, NSamples, SampleOf, Told, told
from torch_secorder.model.parameters import ParameterTable, unwrapped
from torch_secorder.model.restore import lock_of
from torch_secorder.model.selection import Selection
from torch_secorder.recording.options import PassOptions
from torch_secorder.recording.plan import planned
from torch_secorder.recording.quantities import Keeps, wanted


@dataclass(frozen=True)
class MonitorOptions:
    """The arguments of a :class:`FisherMonitor`, whose docstring explains them."""

    reduction: Reduction = "mean"
    loss_scale: float | Tensor | Callable[[], float | Tensor] = 1.0
    parameters: Selection = "trainable"
    batch_axis: BatchAxis = None
    n_samples: NSamples = None
    sample_of: SampleOf = None
    nonfinite: OnError = "raise"
    on_refusal: OnError = "raise"
    repeated_calls: RepeatedCalls | None = None
    every: int = 1
    fisher: MonitorFisher = "empirical"
    max_memory: int | None = None
    keeps: Keeps = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_choice("reduction", self.reduction, ("mean", "sum"))
        require_choice("nonfinite", self.nonfinite, ("raise", "skip"))
        require_choice("on_refusal", self.on_refusal, ("raise", "skip"))
        require_choice("repeated_calls", self.repeated_calls, (None, "same", "new"))
        require_choice("fisher", self.fisher, ("empirical", "sampled", "observed"))
        require_positive_int("every", self.every)
        require_max_memory(self.max_memory)
        if not callable(self.loss_scale):
            object.__setattr__(self, "loss_scale", loss_scale_value(self.loss_scale))

    @property
    def of_passes(self) -> PassOptions:
        """What each backward pass collects."""
        return PassOptions(wanted(self.keeps), self.repeated_calls, self.max_memory)


@dataclass(frozen=True)
class WatchedModel:
    """A model to watch, and what is known about it from one block to the next."""

    model: nn.Module
    table: ParameterTable
    words: Told
    knowledge: ModelKnowledge

    @classmethod
    def of(cls, model: nn.Module, options: MonitorOptions) -> WatchedModel:
        """The model inside of its wrappers. What could not be right later is refused now."""
        bare = unwrapped(model)
        with lock_of(bare):
            table = ParameterTable(bare, options.parameters)
        words = told(bare, options.batch_axis, options.n_samples, options.sample_of)
        if table.frozen:
            planned(bare, table, words)  # It refuses frozen layers without a rule.
        return cls(bare, table, words, knowledge_of(bare, words, checks=False))
