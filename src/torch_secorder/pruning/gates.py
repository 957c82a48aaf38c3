"""The saliency of a channel or a head: the Fisher information of a gate on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from torch_secorder.arguments import (
    MonitorFisher,
    Reduction,
    RepeatedCalls,
    called_as,
    loss_scale_value,
    require_choice,
)
from torch_secorder.autograd.double_precision import widest_dtype
from torch_secorder.batch_axis.knowledge import knowledge_of
from torch_secorder.batch_axis.told import BatchAxis, NSamples, SampleOf, told
from torch_secorder.capture.records import HookedModule
from torch_secorder.curvature import warn_if_no_prediction
from torch_secorder.errors import LifecycleError
from torch_secorder.model.parameters import Parameter, Table, named_modules, unwrapped
from torch_secorder.model.ranks import class_as_written
from torch_secorder.pruning.gate_places import GatePlace, Watched, gate_count, gate_places
from torch_secorder.pruning.gate_rule import GateRule, KeptInput, KeptOutput
from torch_secorder.recording.backward_pass import BackwardPass
from torch_secorder.recording.history import History
from torch_secorder.recording.options import PassOptions
from torch_secorder.recording.plan import Plan, guards
from torch_secorder.recording.quantities import Diagonal
from torch_secorder.recording.recorded_block import RecordedBlock
from torch_secorder.recording.user_recorder import UserRecorder

if TYPE_CHECKING:
    from typing_extensions import Self


_KEPT = {"output": KeptOutput.of, "input": KeptInput.of}


class GateSaliency(dict[str, Tensor]):
    """Module name -> a number for each of its gates, and the places of the gates, which :func:`prune` needs.

    Leave out modules with ``del``. An ordinary dict of these tensors has no ``places``; it is read as gates on outputs.

    Attributes:
        places: module name -> where it has its gates.
    """

    def __init__(self, values: dict[str, Tensor], places: dict[str, GatePlace]):
        super().__init__(values)
        self.places = places


class Gates(RecordedBlock):
    r"""Measures the Fisher information of gates on channels and heads, in the backward passes that run inside the block.

    A gate :math:`m_k = 1` multiplies channel k, or block k of channels, of a module's output or input :math:`a`. With the entries
    i of all of its channels and positions,

    .. math::

       g_{nk} = \frac{\partial \ell_n}{\partial m_k} = \sum_i a_{nki} \frac{\partial \ell_n}{\partial a_{nki}}, \qquad
       F_{kk} = \frac1N \sum_n g_{nk}^2, \qquad \text{saliency}_k = \tfrac12 F_{kk},

    the predicted KL divergence, in nats per sample, of closing the gate. No pass is added: outputs and their gradients exist
    anyway, and an input's gradient is one product with the layer's weight. All calls of a module share its gates. A gate on a
    transformer's head is one on a block of the channels that its output projection reads:
    ``Gates(model, {"*.o_proj": {"side": "input", "groups": heads}, "*.down_proj": {"side": "input"}})``.

    Args:
        model: the model; layers that mix samples, such as BatchNorm in training mode, are refused.
        modules: a mapping from patterns of module names to options; of several patterns that match, the last counts. The options
            are ``side``, "output" or, for linear layers and convolutions, "input"; ``groups``, how many equal blocks of
            channels have a gate each, by default one for each channel; and ``axis``, where the output or the input counts
            channels: by default the last for layers that end in features (linear layers, GPT-2's Conv1D, embeddings,
            LayerNorm, RMSNorm) and 1 for convolutions, PReLU and norms of channels; other modules need it. Instead of a mapping,
            a tuple of types of modules, or a function from a module's name to whether it is watched, puts gates on the outputs
            of these modules; by default they are convolutions and linear layers. For structured pruning of networks with
            BatchNorm, watch ``(nn.BatchNorm2d,)``.
        reduction: how the loss that is differentiated combines its samples, "mean" or "sum".
        loss_scale: the factor that the loss was multiplied by.
        batch_axis: where the samples are counted, if not on axis 0; as in :class:`~torch_secorder.FisherMonitor`.
        n_samples: as in :class:`~torch_secorder.FisherMonitor`.
        sample_of: as in :class:`~torch_secorder.FisherMonitor`.
        repeated_calls: what two calls of the model in one backward pass mean, as in :class:`~torch_secorder.FisherMonitor`.
        fisher: whose labels the losses use, as in :class:`~torch_secorder.FisherMonitor`. Only with "sampled", for labels that
            were drawn from the model's prediction, does :attr:`saliency` predict a KL divergence.

    Attributes:
        places: module name -> where it has its gates.

    Raises:
        ArgumentError: for an invalid argument, if no module is watched, or if a module's channel axis is not known.
        UnsupportedError: for gates on the input of a module that is neither a linear layer nor a convolution.
        CoupledSamplesError: on entry, for layers that mix samples.
        CoverageError: in forward, for a layer on what other layers computed from parameters alone (a network on positions).
        CurvatureError: in the same cases as a :class:`~torch_secorder.FisherMonitor`.

    Example:
        >>> import torch
        >>> from torch_secorder.pruning import Gates
        >>> layers = torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten()
        >>> model = torch.nn.Sequential(*layers, torch.nn.Linear(16, 3))
        >>> with Gates(model, fisher="sampled") as gates:
        ...     outputs = model(torch.randn(8, 1, 4, 4))
        ...     labels = torch.distributions.Categorical(logits=outputs).sample()
        ...     torch.nn.functional.cross_entropy(outputs, labels).backward()
        >>> {name: len(values) for name, values in gates.saliency.items()}, gates.n_samples
        ({'0': 4, '3': 3}, 8)

    Source:
        Theis, Korshunova, Tejani and Huszár (2018), "Faster gaze prediction with dense networks and Fisher pruning"; heads:
        Michel, Levy and Neubig (2019), "Are sixteen heads really better than one?", Kwon et al. (2022), "A fast post-training
        pruning framework for transformers".
    """

    @called_as("Gates(model), and in its block your own loop, or Gates(model, modules) for some modules only")
    def __init__(
        self,
        model: nn.Module,
        modules: Watched = None,
        reduction: Reduction = "mean",
        *,
        loss_scale: float = 1.0,
        batch_axis: BatchAxis = None,
        n_samples: NSamples = None,
        sample_of: SampleOf = None,
        repeated_calls: RepeatedCalls | None = None,
        fisher: MonitorFisher = "empirical",
    ):
        require_choice("fisher", fisher, ("empirical", "sampled", "observed"))
        self._fisher = fisher
        require_choice("reduction", reduction, ("mean", "sum"))
        require_choice("repeated_calls", repeated_calls, (None, "same", "new"))
        self._model, self._reduction, self._loss_scale = unwrapped(model), reduction, loss_scale_value(loss_scale)
        self._words = told(self._model, batch_axis, n_samples, sample_of)
        self._passes = PassOptions({"diagonal": True}, repeated_calls)
        placement = self._words.placement
        self.places, named = gate_places(self._model, modules), dict(named_modules(self._model))
        self._sites = [
            HookedModule(
                name, named[name], {"gate": position}, {}, {}, GateRule(place), placement(name), _KEPT[place.side]
            )
            for position, (name, place) in enumerate(self.places.items())
        ]
        kinds = {name: class_as_written(named[name]).__name__ for name in self.places}
        self._table = Table(Parameter(name, name, kind, (), 0) for name, kind in kinds.items())
        self._history = History(type(self._model).__name__)
        self._sums, self._n, self._passed_by = self._nothing(), 0, 0

    def _nothing(self) -> Diagonal:
        return Diagonal(self._table.names, [row.shape for row in self._table.rows])

    def __enter__(self) -> Self:
        if self._recorder is not None:
            raise LifecycleError("these gates are watched already; leave the block first")
        for guard in guards(named_modules(self._model)).values():
            guard()
        return super().__enter__()

    def _attach(self) -> None:
        modules = named_modules(self._model)
        plan = Plan(self._model, modules, self._sites, guards(modules), self._words)
        knowledge = knowledge_of(self._model, self._words, checks=False)
        self._recorder = UserRecorder(
            *(self._table, plan, knowledge, self._passes),
            history=self._history,
            on_pass=self._count,
            attach_leaf=True,  # Frozen layers have gates as well.
        )
        self._recorder.__enter__()

    def _refuse(self, error: Exception) -> None:
        raise error

    def _count(self, recorder: UserRecorder, current: BackwardPass) -> None:
        """Called at the end of a backward pass: add up the squares of its gates' gradients."""
        if current.accumulator.is_empty and current.error is None:
            self._passed_by += 1
            return
        samples = recorder.lifecycle.finish(current)
        scale = ((samples.batch if self._reduction == "mean" else 1) / self._loss_scale) ** 2
        self._sums.add(samples.parts["diagonal"], samples.squared_norms, scale)  # type: ignore[arg-type]  # its own part
        self._n += samples.batch

    @property
    def n_samples(self) -> int:
        """How many samples were seen."""
        return self._n

    @property
    def fisher(self) -> dict[str, Tensor]:
        """The Fisher information of each gate per sample: module name -> ``[gates]``, float64.

        Gates that no loss depended on, as in a head that was not used, have zeros. A module that was never reached is left out
        if nothing but its output shows how many gates it has.
        """
        if not self._n and self._passed_by:
            raise LifecycleError(
                f"no sample was seen yet: {self._passed_by} backward passes went through the model and through the output of no "
                "module with gates: put the gates on modules that the forward calls (merged adapters take the weights of a layer "
                "without calling it), and whose outputs the loss depends on"
            )
        if not self._n:
            raise LifecycleError(f"no sample was seen yet: {self._history.why_empty()}")
        found = zip(self._table.names, self._sums.totals, strict=True)
        values = {name: total / self._n if total.dim() else self._unreached(name) for name, total in found}
        return {name: value for name, value in values.items() if value is not None}

    def _unreached(self, name: str) -> Tensor | None:
        """The zeros of a module without any gradient, if it is known how many gates it has."""
        module = self._model.get_submodule(name)
        count = gate_count(module, self.places[name])
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        return None if count is None else torch.zeros(count, dtype=widest_dtype(device), device=device)

    @property
    def saliency(self) -> GateSaliency:
        """Half of :attr:`fisher`: the predicted KL divergence, in nats per sample, of removing a channel or a head.

        Warns:
            UserWarning: if the labels are those of the data. The order of gates may still be useful.
        """
        warn_if_no_prediction(self._fisher)
        return GateSaliency({name: 0.5 * values for name, values in self.fisher.items()}, dict(self.places))
