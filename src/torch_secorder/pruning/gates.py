"""What an output channel is worth: the Fisher information of a gate on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_secorder.arguments import require_choice
from torch_secorder.autograd.engine import (
    after_backward,
    current_graph_task,
    in_library_call,
    in_search_pass,
    raise_after_backward,
)
from torch_secorder.autograd.hooks import Hooks
from torch_secorder.autograd.nodes import gradient_edge_of
from torch_secorder.autograd.versions import version
from torch_secorder.capture.records import Site
from torch_secorder.errors import (
    ArgumentError,
    CoverageError,
    LifecycleError,
    NonFiniteError,
    ShapeError,
    UnsupportedError,
)
from torch_secorder.model.hooks import Hook, HookScope
from torch_secorder.model.parameters import named_modules, unwrapped
from torch_secorder.rules import refusal_for

_ANY_CONVOLUTION: Any = nn.Conv1d.__base__
_UNBATCHED: dict[type[nn.Module], int] = {nn.Conv1d: 2, nn.Conv2d: 3, nn.Conv3d: 4}


@dataclass(eq=False)
class _GatePass:
    """A backward pass that is under way: module -> ``[n, channels]``, the gradients of its gates so far."""

    gradients: dict[str, Tensor] = field(default_factory=dict)
    error: Exception | None = None


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a watched module; its output and inputs with their versions, and how to run it again."""

    site: Site
    output: Tensor
    version: int
    inputs: list[tuple[Tensor, int]]
    again: Callable[[], Tensor]

    @torch.no_grad()
    def products(self, grad: Tensor, batch_axis: int) -> Tensor:
        """Output times gradient, summed over everything but samples and channels: ``[n, channels]``, float64."""
        output = self.output
        if version(output) != self.version:  # an in-place activation came after it
            if any(version(x) != seen for x, seen in self.inputs):
                raise CoverageError(
                    f"{self.site}: its input and its output were both changed in place; change one of them out of place"
                )
            output = self.again()
        both = output.double() * grad.reshape(output.shape).double()
        batch, channel = batch_axis % both.dim(), both.dim() - 1 if isinstance(self.site.module, nn.Linear) else 1
        if channel == batch:
            raise ShapeError(f"{self.site}: axis {channel} counts its channels and can't count the samples")
        return both.movedim((batch, channel), (0, 1)).flatten(2).sum(2) if both.dim() > 2 else both.movedim(batch, 0)


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
        batch_axis: where the modules' outputs count the samples.

    Raises:
        ArgumentError: for arguments that mean nothing, or if no module is watched.
        CoupledSamplesError: on entry, for layers that mix samples.
        ShapeError: in forward, for outputs with other batch sizes than the first in that pass.

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
        batch_axis: int = 0,
    ):
        require_choice("reduction", reduction, ("mean", "sum"))
        if isinstance(loss_scale, bool) or not (isinstance(loss_scale, (int, float)) and 0 < loss_scale < float("inf")):
            raise ArgumentError(f"loss_scale must be a positive number, not {loss_scale!r}")
        self._model, self._reduction, self._loss_scale, self._axis = unwrapped(model), reduction, loss_scale, batch_axis
        self._sites = [
            Site(name, module, {}, {}, {}, None)
            for name, module in named_modules(self._model)
            if _is_watched(name, module, modules)
        ]
        if not self._sites:
            raise ArgumentError(f"{type(self._model).__name__} has no module of those to watch")
        self._hooks = Hooks()
        self._active = False
        self._sums: dict[str, Tensor] = {}
        self._n = 0
        self._passes: dict[int, _GatePass] = {}

    def __enter__(self) -> ChannelGates:
        if self._active:
            raise LifecycleError("these gates are watched already; leave the block first")
        for name, module in named_modules(self._model):
            if (refusal := refusal_for(module)) is not None and (error := refusal(module)) is not None:
                raise type(error)(f"{type(module).__name__} '{name}': {error}")
        return super().__enter__()

    def _attach(self) -> None:
        for site in self._sites:
            add = site.module.register_forward_hook
            self._hooks.add(site.module, add, Hook(self, "_seen", site), prepend=True, with_kwargs=True)
        self._active = True

    def _detach(self) -> None:
        self._active = False
        self._passes.clear()
        self._hooks.remove()

    @property
    def n_samples(self) -> int:
        """How many samples were seen."""
        return self._n

    @property
    def fisher(self) -> dict[str, Tensor]:
        """The Fisher information of each gate per sample: module name -> ``[channels]``, float64."""
        if not self._n:
            raise LifecycleError("no sample was seen yet: run forward and backward inside the block")
        return {site.name: self._sums[site.name] / self._n for site in self._sites if site.name in self._sums}

    @property
    def saliency(self) -> dict[str, Tensor]:
        """Half of :attr:`fisher`: the predicted rise of the loss, in nats per sample, when a channel is removed."""
        return {name: 0.5 * values for name, values in self.fisher.items()}

    def _seen(self, site: Site, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if (
            not (self._active and torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad)
            or in_library_call()
        ):
            return
        recomputed_in = current_graph_task()  # activation checkpointing runs this forward inside of a backward pass
        if recomputed_in != -1:
            self._opened(recomputed_in)
        if (unbatched := _UNBATCHED.get(type(module))) is not None and output.dim() == unbatched:
            raise ShapeError(f"{site}: its output of shape {tuple(output.shape)} has no batch axis")
        edge = gradient_edge_of(output)
        if edge is None:
            raise UnsupportedError(
                f"{site}: its output is a leaf of the autograd graph, not something that it computed"
            )
        inputs = [(x, version(x)) for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        call = _Call(
            site, output.detach(), version(output), inputs, partial(type(module).forward, module, *args, **kwargs)
        )
        edge.node.register_prehook(partial(self._fired, call, recomputed_in, edge.output_nr))

    def _fired(self, call: _Call, recomputed_in: int, output_nr: int, grads: tuple[Tensor | None, ...]) -> None:
        grad = grads[output_nr]
        if not self._active or in_search_pass() or grad is None:
            return
        current = self._opened(current_graph_task() if recomputed_in == -1 else recomputed_in)
        try:
            name, found = call.site.name, call.products(grad, self._axis)
            if current.gradients and len(found) != len(next(iter(current.gradients.values()))):
                raise ShapeError(
                    f"{call.site}: its output of {len(found)} samples is in a pass of others; set batch_axis="
                )
            current.gradients[name] = current.gradients[name] + found if name in current.gradients else found
        except Exception as error:  # what goes wrong waits for the end of the pass, so that .grad is complete
            current.error = current.error or error

    def _opened(self, task: int) -> _GatePass:
        if task not in self._passes:
            self._passes[task] = _GatePass()
            after_backward(partial(self._closed, task))
        return self._passes[task]

    def _closed(self, task: int) -> None:
        """A backward pass is over: square its gates' gradients and add them up."""
        current = self._passes.pop(task, None)
        if current is None or not (current.gradients or current.error):
            return
        squares: dict[str, Tensor] = {}
        if current.error is None:
            n = len(next(iter(current.gradients.values())))
            factor = (n if self._reduction == "mean" else 1) / self._loss_scale
            squares = {name: (g * factor).square().sum(0) for name, g in current.gradients.items()}
            if bad := [name for name, values in squares.items() if not bool(torch.isfinite(values).all())]:
                current.error = NonFiniteError(
                    f"the gates of {', '.join(bad)} have gradients that are infinite or NaN; the pass is left out"
                )
        if current.error is not None:
            raise_after_backward(current.error)
            return
        self._n += n
        for name, values in squares.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(values)) + values


def _is_watched(name: str, module: nn.Module, modules: Any) -> bool:
    if modules is None:
        return isinstance(module, (_ANY_CONVOLUTION, nn.Linear))
    return isinstance(module, modules) if isinstance(modules, (tuple, type)) else bool(modules(name))
