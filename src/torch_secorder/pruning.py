r"""What a weight or a channel is worth, and taking the cheapest away.

Setting weight i to zero is the error ``delta_i = -w_i``, whose predicted Kullback-Leibler divergence per sample, to second
order and without cross terms, is the saliency :math:`\tfrac12 F_{ii} w_i^2` of optimal brain damage. For a channel it is
half the Fisher information of a gate that multiplies the channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from torch_secorder.capture import current_backward, output_edge, probing
from torch_secorder.errors import ArgumentError, CoverageError, LifecycleError, NonFiniteError, ShapeError
from torch_secorder.hooks import Attached, Hook, Hooks
from torch_secorder.monitor import FisherMonitor
from torch_secorder.parameters import named_modules, plain_name, unwrapped
from torch_secorder.records import Site
from torch_secorder.results import checked
from torch_secorder.rules import refusal_for
from torch_secorder.sources import channel_axis, curvature, warn_if_no_prediction
from torch_secorder.tables import table

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ChannelGates", "GroupImportance", "prune", "pruning_sensitivity", "weight_saliency"]

_Convolution = nn.modules.conv._ConvNd
_Norm = nn.modules.batchnorm._NormBase
_UNBATCHED: dict[type[nn.Module], int] = {nn.Conv1d: 2, nn.Conv2d: 3, nn.Conv3d: 4}


def weight_saliency(
    model: nn.Module,
    source: FisherMonitor | pd.DataFrame,
    *,
    parameters: str | Callable[[str], bool] = "weights",
    shrinkage: float = 0.0,
    diagonal: Mapping[str, Tensor] | None = None,
    fisher: str | None = None,
) -> dict[str, Tensor]:
    r"""The predicted KL divergence, in nats per sample, of setting each single weight to zero.

    .. math:: s_i = \tfrac12 F_{ii} w_i^2

    with F averaged over samples whatever the report's reduction. Where only the trace of a parameter is known, its mean
    :math:`\operatorname{tr} F_p / d_p` stands for every :math:`F_{ii}`: magnitudes within a layer, curvature between layers.

    Whoever prunes by an estimated diagonal picks the entries that happen to be underestimated, above all those of channels
    that no sample woke up. ``shrinkage`` :math:`\lambda` guards against that: it puts
    :math:`(1 - \lambda) F_{ii} + \lambda \operatorname{tr} F_p / d_p` in the place of :math:`F_{ii}`. From few samples, 0.5
    prunes far better than 0 or 1.

    Args:
        model: the model that was analysed.
        source: a monitor with ``diagonal=True``, or, for the second form, a report by parameter.
        parameters: "weights" for those with two or more axes, "all", or a function from a name to whether it counts.
        shrinkage: from 0, for the diagonal as it is, to 1, for its mean over each parameter.
        diagonal: the Fisher diagonal that belongs to a report, in the report's scaling.
        fisher: which Fisher the source is of, if it can't know; see
            :func:`torch_secorder.quantization.quantization_sensitivity`.

    Returns:
        A dict from names to tensors of the parameters' shapes.

    Raises:
        ArgumentError: if the report is of another model or lacks columns, or for a shrinkage outside [0, 1].

    Warns:
        UserWarning: if the source is of the empirical or the observed Fisher. The order of weights may still be of use.

    Example:
        >>> import torch
        >>> from torch_secorder import fisher_report
        >>> from torch_secorder.pruning import prune, weight_saliency
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> report = fisher_report(model, None, (torch.randn(32, 4), None), fisher="exact", progress=False)
        >>> prune(model, weight_saliency(model, report), amount=0.5)
        >>> sum(int((layer.weight == 0).sum()) for layer in (model[0], model[2]))  # of 32 and 24
        28

    Source:
        LeCun, Denker and Solla (1990), "Optimal brain damage".
    """
    share = _share(shrinkage, "shrinkage")
    known = curvature(model, source, fisher=fisher, diagonal=diagonal)
    warn_if_no_prediction(known.fisher)
    if not callable(parameters):
        checked("parameters", parameters, ("weights", "all"))
    return {
        name: (0.5 * _shrunk(known.of(name).double(), share) * weight.double().square()).to(
            torch.promote_types(weight.dtype, torch.float32)
        )
        for name, weight in known.parameters.items()
        if (parameters(name) if callable(parameters) else parameters == "all" or weight.dim() > 1)
    }


def pruning_sensitivity(
    saliency: Mapping[str, Tensor],
    amounts: Sequence[float] = (0.1, 0.3, 0.5),
    *,
    order: Mapping[str, Tensor] | None = None,
) -> pd.DataFrame:
    r"""The predicted KL divergence, in nats per sample, of pruning each parameter alone to each sparsity.

    It is the sum of the saliencies of the :math:`\operatorname{round}(a\, d_p)` entries that go, of :math:`d_p` in all.

    Args:
        saliency: what :func:`weight_saliency` or :attr:`ChannelGates.saliency` gave.
        amounts: shares that are pruned, each from 0 to 1.
        order: what to prune by, smallest first, if not by the saliency: the weights' absolute values, say.

    Returns:
        A DataFrame with index ``parameter`` and columns ``numel`` and one for each amount.

    Raises:
        ArgumentError: for amounts outside [0, 1], or an order with other names or shapes.

    Example:
        >>> import torch
        >>> from torch_secorder.pruning import pruning_sensitivity
        >>> pruning_sensitivity({"weight": torch.tensor([[3.0, 1.0], [2.0, 4.0]])}, amounts=(0.25, 0.5)).loc["weight", 0.5]
        np.float64(3.0)
    """
    shares = [_share(amount) for amount in amounts]
    rows: list[dict[Any, Any]] = []
    for name, scores in saliency.items():
        by = scores if order is None else order.get(name)
        if by is None or by.shape != scores.shape:
            raise ArgumentError(f"order must have a tensor of shape {tuple(scores.shape)} for {name}")
        sums = scores.flatten().double()[by.flatten().argsort()].cumsum(0)
        row: dict[Any, Any] = {"parameter": name, "numel": scores.numel()}
        for share in shares:
            count = round(share * scores.numel())
            row[share] = float(sums[count - 1]) if count else 0.0
        rows.append(row)
    return table(rows, "parameter", ("numel", *shares), unit="nats per sample")


def prune(
    model: nn.Module, saliency: Mapping[str, Tensor], amount: float, *, scope: str = "global", minimum: int = 1
) -> None:
    """Mask the weights or channels of least saliency, through :mod:`torch.nn.utils.prune`.

    The masks are PyTorch's own: ``weight_orig`` and ``weight_mask`` appear, :func:`torch.nn.utils.prune.is_pruned` says so, and
    :func:`torch.nn.utils.prune.remove` makes it permanent. Pruning again adds to the masks that are there, and what is
    pruned already counts among ``amount``.

    Args:
        model: the model, whose modules get masks.
        saliency: by parameter, in its shape (:func:`weight_saliency`), or by module, one number for each of its output
            channels (:attr:`ChannelGates.saliency`): then a channel's weights and its bias go together, and the module
            puts out zeros there. Leave out the names that are not to be pruned, such as the last layer's.
        amount: the share to be pruned, from 0 to 1: of all entries, or of each.
        scope: "global" for the least of all, or "layer" for the same share of each parameter or module.
        minimum: of channels, how many a module keeps at least. Weights may go entirely.

    Raises:
        ArgumentError: for an amount outside [0, 1], or a saliency that doesn't fit the model: names, shapes, numbers that
            are NaN. Then nothing was pruned.

    Example:
        >>> import torch
        >>> from torch_secorder.pruning import prune
        >>> layer = torch.nn.Linear(2, 2)
        >>> prune(layer, {"weight": torch.tensor([[1.0, 4.0], [3.0, 2.0]])}, amount=0.5)
        >>> layer.weight_mask
        tensor([[0., 1.],
                [1., 0.]])
    """
    share = _share(amount)
    checked("scope", scope, ("global", "layer"))
    model = unwrapped(model)
    if not saliency:
        raise ArgumentError("the saliency has no entry; nothing can be pruned")
    kinds = {name: _target(model, name, scores) for name, scores in saliency.items()}
    if len({channels for _, _, channels in kinds.values()}) > 1:
        raise ArgumentError("saliencies of weights and of channels can't be compared; prune by one after the other")
    by_channel = next(iter(kinds.values()))[2]
    left = {name: _unpruned(scores, *kinds[name]) for name, scores in saliency.items()}
    keep = _kept(left, share, scope, minimum if by_channel else 0)
    for name, (module, local, channels) in kinds.items():
        if not channels:
            torch_prune.custom_from_mask(module, local, keep[name])
            continue
        axis = channel_axis(module)
        weight: Any = module.weight
        sides = [1] * weight.dim()
        sides[axis] = -1
        torch_prune.custom_from_mask(module, "weight", keep[name].view(sides).expand_as(weight))
        if getattr(module, "bias", None) is not None:
            torch_prune.custom_from_mask(module, "bias", keep[name])


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
        if output._version != self.version:  # an in-place activation came after it
            if any(x._version != seen for x, seen in self.inputs):
                raise CoverageError(
                    f"{self.site}: its input and its output were both changed in place; change one of them out of place"
                )
            output = self.again()
        both = output.double() * grad.reshape(output.shape).double()
        batch, channel = batch_axis % both.dim(), both.dim() - 1 if isinstance(self.site.module, nn.Linear) else 1
        if channel == batch:
            raise ShapeError(f"{self.site}: axis {channel} counts its channels and can't count the samples")
        return both.movedim((batch, channel), (0, 1)).flatten(2).sum(2) if both.dim() > 2 else both.movedim(batch, 0)


class ChannelGates(Attached):
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
        checked("reduction", reduction, ("mean", "sum"))
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
        if not (self._active and torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad):
            return
        replay_of = current_backward()  # activation checkpointing runs this forward inside of a backward pass
        if replay_of != -1:
            self._opened(replay_of)
        if (unbatched := _UNBATCHED.get(type(module))) is not None and output.dim() == unbatched:
            raise ShapeError(f"{site}: its output of shape {tuple(output.shape)} has no batch axis")
        edge = output_edge(output, site)
        inputs = [(x, x._version) for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        call = _Call(
            site, output.detach(), output._version, inputs, partial(type(module).forward, module, *args, **kwargs)
        )
        edge.node.register_prehook(partial(self._fired, call, replay_of, edge.output_nr))

    def _fired(self, call: _Call, replay_of: int, output_nr: int, grads: tuple[Tensor | None, ...]) -> None:
        grad = grads[output_nr]
        if not self._active or probing() or grad is None:
            return
        current = self._opened(current_backward() if replay_of == -1 else replay_of)
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
            _at_the_end(partial(self._closed, task))
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
            _at_the_end(partial(_raise, current.error))  # behind whatever else waits for the end of this pass
            return
        self._n += n
        for name, values in squares.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(values)) + values


class GroupImportance:
    """The importance of coupled channels, as Torch-Pruning's pruners ask for it (``importance=``).

    Channels that are coupled through skip connections or depthwise convolutions have to go together; finding them is that
    package's task. A group's importance is the sum of the saliencies of the gates on its members' outputs. Where norms of
    the group are watched, they stand for the layers in front of them.

    Args:
        model: the model that the pruner changes. Names are looked up once, so make this before pruning.
        saliency: :attr:`ChannelGates.saliency`, or by parameter (:func:`weight_saliency`): then a channel's importance is the
            sum over all weights that go with it, those that read the channel too.

    Raises:
        ArgumentError: if names or shapes are not the model's; when called, if a group has no member with a saliency.

    Example:
        >>> import torch
        >>> from torch_secorder.pruning import ChannelGates, GroupImportance
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> with ChannelGates(model) as gates:
        ...     torch.nn.functional.cross_entropy(model(torch.randn(8, 1, 4, 4)), torch.randint(3, (8,))).backward()
        >>> importance = GroupImportance(model, gates.saliency)  # tp.pruner.BasePruner(model, x, importance=importance, ...)

    Source:
        Fang et al. (2023), "DepGraph: towards any structural pruning".
    """

    def __init__(self, model: nn.Module, saliency: Mapping[str, Tensor]):
        model = unwrapped(model)
        self._channels: dict[nn.Module, Tensor] = {}
        self._weights: dict[tuple[nn.Module, str], Tensor] = {}
        modules = dict(named_modules(model))
        for name, scores in saliency.items():
            owner, _, local = name.rpartition(".")
            if name in modules and scores.dim() == 1:
                self._channels[modules[name]] = scores.detach()
            elif (
                owner in modules
                and (p := modules[owner]._parameters.get(local)) is not None
                and p.shape == scores.shape
            ):
                self._weights[modules[owner], local] = scores.detach()
            else:
                raise ArgumentError(
                    f"the saliency is of another model: {name} of shape {tuple(scores.shape)} is not in it"
                )

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor:
        """One number for each channel of the group, in the order of its root."""
        members = [
            (item.dep.target.module, _way(item.dep.handler), list(item.idxs), _roots(item)) for item in _items(group)
        ]
        size = 1 + max((root for *_, roots in members for root in roots), default=-1)
        found = [
            (module, scores, roots)
            for module, way, idxs, roots in members
            if (scores := self._scores(module, way, idxs)) is not None and len(scores) == len(roots)
        ]
        if norms := [entry for entry in found if isinstance(entry[0], _Norm) and entry[0] in self._channels]:
            found = norms
        if not found:
            names = ", ".join(sorted({type(module).__name__ for module, *_ in members}))
            raise ArgumentError(
                f"no member of the group ({names}) has a saliency; watch these modules, or ignore the layer"
            )
        total = torch.zeros(size, dtype=torch.float64)
        for _, scores, roots in found:
            total.index_add_(0, torch.tensor(roots), scores.double().cpu())
        return total

    def _scores(self, module: nn.Module, way: str, idxs: list[int]) -> Tensor | None:
        """What the member's channels ``idxs`` are worth, or None if nothing is known of it."""
        if way == "out" and module in self._channels:
            return self._channels[module][idxs]
        parts = []
        for local in ("weight", "bias"):
            scores = self._weights.get((module, local))
            if scores is None or (local == "bias" and way == "in"):
                continue
            axis = 0 if scores.dim() == 1 else (channel_axis(module) if way == "out" else 1 - channel_axis(module))
            by_channel = scores.movedim(axis, 0).flatten(1).sum(1) if scores.dim() > 1 else scores
            if max(idxs, default=-1) >= len(by_channel):  # the input of a grouped convolution
                by_channel = by_channel.repeat(getattr(module, "groups", 1))
            parts.append(by_channel[idxs])
        return torch.stack(parts).sum(0) if parts else None


def _at_the_end(callback: Callable[[], None]) -> None:
    """Call back when the backward pass under way is over."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def _raise(error: Exception) -> None:
    raise error


def _items(group: Any) -> list[Any]:
    return [group[position] for position in range(len(group))]


def _roots(item: Any) -> list[int]:
    roots = item.root_idxs if item.root_idxs is not None else item.idxs
    return [] if any(root is None for root in roots) else [int(root) for root in roots]


def _way(handler: Any) -> str:
    """Whether Torch-Pruning's function cuts a member's outputs or its inputs."""
    name = getattr(handler, "__name__", "")
    return "in" if name.startswith("prune_in") or "in_channels" in name else "out"


def _is_watched(name: str, module: nn.Module, modules: Any) -> bool:
    if modules is None:
        return isinstance(module, (_Convolution, nn.Linear))
    return isinstance(module, modules) if isinstance(modules, (tuple, type)) else bool(modules(name))


def _shrunk(diagonal: Tensor, share: float) -> Tensor:
    return (1 - share) * diagonal + share * diagonal.mean() if share else diagonal


def _share(amount: float, name: str = "amount") -> float:
    if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not 0 <= amount <= 1:
        raise ArgumentError(f"{name} must be a share from 0 to 1, not {amount!r}")
    return float(amount)


def _target(model: nn.Module, name: str, scores: Tensor) -> tuple[nn.Module, str, bool]:
    """The module, its parameter's name without pruning's suffix, and whether the scores are of channels."""
    if bool(torch.isnan(scores).any()):
        raise ArgumentError(f"the saliency of {name} has NaN")
    modules = {plain_name(key): module for key, module in model.named_modules(remove_duplicate=False)}
    owner, _, local = name.rpartition(".")
    parameter = modules[owner]._parameters.get(local) if owner in modules else None
    if parameter is not None:
        plain = local.removesuffix("_orig") if hasattr(modules[owner], f"{local.removesuffix('_orig')}_mask") else local
        expected, found = tuple(parameter.shape), (modules[owner], plain, False)
    elif name in modules and isinstance(getattr(modules[name], "weight", None), Tensor):
        weight: Any = modules[name].weight
        axis = channel_axis(modules[name]) if weight.dim() > 1 else 0
        groups = getattr(modules[name], "groups", 1) if axis else 1
        if groups != 1:
            raise ArgumentError(f"channels of {name}, a grouped transposed convolution, can't be masked; leave it out")
        expected, found = (weight.shape[axis],), (modules[name], "weight", True)
    else:
        raise ArgumentError(
            f"the saliency is of another model: {type(model).__name__} has no parameter or layer {name!r}"
        )
    if tuple(scores.shape) != expected:
        raise ArgumentError(f"the saliency of {name} has shape {tuple(scores.shape)}, but {expected} is needed")
    return found


def _unpruned(scores: Tensor, module: nn.Module, local: str, channels: bool) -> Tensor:
    """The scores, with minus infinity where a mask that is there has pruned already."""
    mask = getattr(module, f"{local}_mask", None)
    if mask is None:
        return scores
    if channels:
        mask = mask.movedim(channel_axis(module) if mask.dim() > 1 else 0, 0).flatten(1).any(1)
    return scores.masked_fill(mask.to(scores.device) == 0, -torch.inf)


def _kept(saliency: Mapping[str, Tensor], share: float, scope: str, minimum: int) -> dict[str, Tensor]:
    """Masks with 1 for what stays."""
    if scope == "layer":
        counts = {name: min(round(share * s.numel()), max(0, s.numel() - minimum)) for name, s in saliency.items()}
        return {name: _without_least(scores, counts[name]) for name, scores in saliency.items()}
    protected = {name: _best(scores, minimum) for name, scores in saliency.items()}
    flat = torch.cat(
        [
            scores.detach().double().masked_fill(protected[name], torch.inf).flatten().cpu()
            for name, scores in saliency.items()
        ]
    )
    count = min(round(share * len(flat)), int((flat < torch.inf).sum()) if minimum else len(flat))
    masks = _without_least(flat, count).split([scores.numel() for scores in saliency.values()])
    return {name: mask.view_as(s).to(s.device) for mask, (name, s) in zip(masks, saliency.items(), strict=True)}


def _best(scores: Tensor, count: int) -> Tensor:
    best = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    best[scores.flatten().topk(min(count, scores.numel())).indices] = True
    return best.view_as(scores)


def _without_least(scores: Tensor, count: int) -> Tensor:
    mask = torch.ones(scores.numel(), device=scores.device)
    mask[scores.flatten().topk(count, largest=False).indices] = 0
    return mask.view_as(scores)
