"""What an output channel is worth: the Fisher information of a gate on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch_secorder.arguments import loss_scale_value, require_choice
from torch_secorder.autograd.versions import version, versions
from torch_secorder.batch_axis.knowledge import knowledge_of
from torch_secorder.capture.records import Call, HookedModule
from torch_secorder.errors import ArgumentError, CoverageError, LifecycleError, ShapeError, UnsupportedError
from torch_secorder.model.hooks import HookScope
from torch_secorder.model.parameters import Parameter, Table, named_modules, unwrapped
from torch_secorder.model.ranks import class_as_written
from torch_secorder.per_sample import Dense, PerSampleGradient
from torch_secorder.recording.accumulator import PassOptions
from torch_secorder.recording.backward_pass import BackwardPass
from torch_secorder.recording.plan import BatchAxis, Plan, axis_of_inputs, guards, placements
from torch_secorder.recording.quantities import Diagonal
from torch_secorder.recording.user_recorder import UserRecorder

if TYPE_CHECKING:
    from typing_extensions import Self

_ANY_CONVOLUTION: Any = nn.Conv1d.__base__
_UNBATCHED: dict[type[nn.Module], int] = {nn.Conv1d: 2, nn.Conv2d: 3, nn.Conv3d: 4}


class ChannelGates(HookScope):
    r"""Watches the Fisher information of a gate on each output channel, in the passes that run inside.

    A gate :math:`m_k = 1` multiplies channel k of a module's output :math:`a`. With positions i of the channel,

    .. math::

       g_{nk} = \frac{\partial \ell_n}{\partial m_k} = \sum_i a_{nki} \frac{\partial \ell_n}{\partial a_{nki}}, \qquad
       F_{kk} = \frac1N \sum_n g_{nk}^2, \qquad \text{saliency}_k = \tfrac12 F_{kk},

    the predicted rise, in nats per sample, when the gate closes. No pass is added: outputs and their gradients are there anyway.
    All calls of a module share its gates.

    Args:
        model: the model; layers that mix samples, such as BatchNorm in training mode, are refused.
        reduction: how the loss that is differentiated combines its samples, "mean" or "sum".
        loss_scale: the factor that the loss was multiplied by.
        modules: types of modules, or a function from a module's name to whether it is watched; by default convolutions and
            linear layers. For structured pruning of networks with BatchNorm, watch ``(nn.BatchNorm2d,)``.
        batch_axis: where the samples are counted, if not on axis 0; as in :class:`~torch_secorder.FisherMonitor`.
        repeated_calls: what two calls of the model in one backward pass mean, as there.

    Raises:
        ArgumentError: for arguments that mean nothing, or if no module is watched.
        CoupledSamplesError: on entry, for layers that mix samples.
        CurvatureError: as a :class:`~torch_secorder.FisherMonitor`, which finds samples and counts calls in the same way.

    Example:
        >>> import torch
        >>> from torch_secorder.pruning import ChannelGates
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> with ChannelGates(model) as gates:
        ...     labels = torch.distributions.Categorical(logits=(outputs := model(torch.randn(8, 1, 4, 4)))).sample()
        ...     torch.nn.functional.cross_entropy(outputs, labels).backward()
        >>> {name: len(values) for name, values in gates.saliency.items()}, gates.n_samples
        ({'0': 4, '3': 3}, 8)

    Source:
        Theis, Korshunova, Tejani and Huszár (2018), "Faster gaze prediction with dense networks and Fisher pruning".
    """

    def __init__(
        self,
        model: nn.Module,
        reduction: str = "mean",
        *,
        loss_scale: float = 1.0,
        modules: tuple[type[nn.Module], ...] | Callable[[str], bool] | None = None,
        batch_axis: BatchAxis = None,
        repeated_calls: str | None = None,
    ):
        require_choice("reduction", reduction, ("mean", "sum"))
        require_choice("repeated_calls", repeated_calls, (None, "same", "new"))
        self._model, self._reduction, self._loss_scale = unwrapped(model), reduction, loss_scale_value(loss_scale)
        self._batch_axis, self._passes = batch_axis, PassOptions({"diagonal": True}, repeated_calls)
        placement = placements(self._model, batch_axis)
        watched = [(name, m) for name, m in named_modules(self._model) if _is_watched(name, m, modules)]
        if not watched:
            raise ArgumentError(f"{type(self._model).__name__} has no module of those to watch")
        self._sites = [
            HookedModule(name, m, {"gate": position}, {}, {}, _GATE, placement(name), _Output.of)
            for position, (name, m) in enumerate(watched)
        ]
        self._table = Table(Parameter(name, name, class_as_written(m).__name__, (), 0) for name, m in watched)
        self._recorder: UserRecorder | None = None
        self._sums, self._n = self._nothing(), 0

    def _nothing(self) -> Diagonal:
        return Diagonal(self._table.names, [row.shape for row in self._table.rows])

    def __enter__(self) -> Self:
        if self._recorder is not None:
            raise LifecycleError("these gates are watched already; leave the block first")
        for guard in guards(self._model).values():
            guard()
        return super().__enter__()

    def _attach(self) -> None:
        plan = Plan(
            self._model, self._sites, guards(self._model), axis_of_inputs(placements(self._model, self._batch_axis))
        )
        knowledge = knowledge_of(self._model, self._batch_axis, checks=False)
        self._recorder = UserRecorder(self._table, plan, knowledge, self._passes, on_pass=self._count)
        self._recorder.__enter__()

    def _detach(self) -> None:
        if self._recorder is not None:
            self._recorder.__exit__()
            self._recorder = None

    def __exit__(self, *exc_info: object) -> None:
        waiting = [] if self._recorder is None else self._recorder.waiting
        super().__exit__(*exc_info)
        if waiting and not any(exc_info):  # the user's own exception comes first
            raise waiting[0]

    def _count(self, current: BackwardPass) -> None:
        """A backward pass is over: add up the squares of its gates' gradients."""
        if self._recorder is None or (current.accumulator.is_empty and current.error is None):
            return
        samples = self._recorder.finish(current)
        scale = ((samples.batch if self._reduction == "mean" else 1) / self._loss_scale) ** 2
        self._sums.add(samples.parts["diagonal"], samples.squared_norms, scale)  # type: ignore[arg-type]  # its own part
        self._n += samples.batch

    @property
    def n_samples(self) -> int:
        """How many samples were seen."""
        return self._n

    @property
    def fisher(self) -> dict[str, Tensor]:
        """The Fisher information of each gate per sample: module name -> ``[channels]``, float64."""
        if not self._n:
            raise LifecycleError("no sample was seen yet: run forward and backward inside the block")
        found = zip(self._table.names, self._sums.totals, strict=True)
        return {name: total / self._n for name, total in found if total.dim()}

    @property
    def saliency(self) -> dict[str, Tensor]:
        """Half of :attr:`fisher`: the predicted rise of the loss, in nats per sample, when a channel is removed."""
        return {name: 0.5 * values for name, values in self.fisher.items()}


class _Gate:
    """The rule of a gate: its gradient is the sum over positions of the output times the output's gradient."""

    name = "gate"
    depends_on = None

    def __call__(
        self, module: nn.Module, call: Call, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, PerSampleGradient]:
        kept: _Output = call.kept
        output, g, axis = kept.value(), call.grad_output.double(), call.batch_axis
        both = g * (output[None] if axis is None else output.movedim(axis, 0)).double()
        channels = _axis_of_channels(module, axis, both.dim())
        product = both.movedim(channels, 1)
        return {"gate": Dense(product.flatten(2).sum(2) if product.dim() > 2 else product)}


_GATE = _Gate()


def _axis_of_channels(module: nn.Module, batch_axis: int | None, dims: int) -> int:
    """Where a module's output has its channels once the samples come first.

    Linear layers have them last, all others on axis 1 of their output.

    Raises:
        ShapeError: if that axis counts the samples, or an output without a batch axis leaves it open.
    """
    channels = dims - 1 if isinstance(module, nn.Linear) else 1
    if batch_axis is None:
        if not isinstance(module, nn.Linear):
            raise ShapeError("it was called without a batch axis, so that nothing shows which axis counts its channels")
        return channels
    if dims < 2 or channels == batch_axis:
        raise ShapeError(f"axis {batch_axis} counts its channels and can't count the samples")
    # Axes before that of the samples move up by one when the samples come first.
    return channels + 1 if channels < batch_axis else channels


@dataclass(frozen=True, eq=False)
class _Output:
    """A module's output as it was in forward, and how to get it again."""

    module: nn.Module
    output: Tensor
    output_version: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> _Output:
        """That of a call under way."""
        if (unbatched := _UNBATCHED.get(type(module))) is not None and output.dim() == unbatched:
            raise ShapeError(
                f"a {type(module).__name__} gave an output of shape {tuple(output.shape)}, without a batch axis"
            )
        before = versions((*args, *kwargs.values()))
        return cls(module, output.detach(), version(output), args, kwargs, before)

    @torch.no_grad()
    def value(self) -> Tensor:
        """The output; computed again if an activation in place came after it.

        Raises:
            CoverageError: if the input was changed as well.
            UnsupportedError: if the module draws random numbers, which can't be drawn again.
        """
        if version(self.output) == self.output_version:
            return self.output
        if versions((*self.args, *self.kwargs.values())) != self.versions:
            raise CoverageError("its input and its output were both changed in place; change one of them out of place")
        before = torch.get_rng_state()
        found: Tensor = type(self.module).forward(self.module, *self.args, **self.kwargs)
        if not torch.equal(before, torch.get_rng_state()):
            torch.set_rng_state(before)
            raise UnsupportedError(
                "its output was changed in place and it draws random numbers, so that the output can't be had again: change "
                "it out of place"
            )
        return found


def _is_watched(name: str, module: nn.Module, modules: Any) -> bool:
    if modules is None:
        return isinstance(module, (_ANY_CONVOLUTION, nn.Linear))
    return isinstance(module, modules) if isinstance(modules, (tuple, type)) else bool(modules(name))
