"""Pruning the weights or channels of least saliency, through PyTorch's own masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from torch_secorder.arguments import Scope, called_as, described, require_choice, require_share
from torch_secorder.autograd.double_precision import on_host
from torch_secorder.errors import ArgumentError
from torch_secorder.model.channels import ChannelSums
from torch_secorder.model.names import plain_name
from torch_secorder.model.parameters import unwrapped
from torch_secorder.pruning.gate_places import ANY_CONVOLUTION, GatePlace, weight_axis
from torch_secorder.pruning.uncalled import apply_where_called


@called_as(
    "prune(model, saliency, amount), where saliency is weight_saliency(model, monitor) or gates.saliency, and amount the share "
    "that is to go, such as 0.3"
)
def prune(
    model: nn.Module, saliency: Mapping[str, Tensor], amount: float, *, scope: Scope = "global", minimum: int = 1
) -> None:
    """Mask the weights or channels of least saliency, through :mod:`torch.nn.utils.prune`.

    The masks are PyTorch's own: ``weight_orig`` and ``weight_mask`` appear, :func:`torch.nn.utils.prune.is_pruned` says so, and
    :func:`torch.nn.utils.prune.remove` makes the pruning permanent. Pruning again adds to existing masks, and entries that are
    already pruned count as part of ``amount``. A tied weight is masked in all modules that have it. Where parameters are read
    from a module that is not called (a ``ParameterList``, the output projection of ``nn.MultiheadAttention``), the module around
    it applies the masks.

    Args:
        model: the model, whose modules get masks.
        saliency: by parameter, in its shape (:func:`weight_saliency`), or by module, with one number for each of its gates
            (:attr:`Gates.saliency`). With gates on outputs, all weights of an output channel and its bias are pruned together,
            so that the module outputs zeros there; with gates on inputs, the weights that read the channel are. A gate on a
            block prunes all of its channels. A dict that is not :attr:`Gates.saliency` has one number for each output channel.
            Leave out the names that are not to be pruned, such as the last layer's.
        amount: the share to prune, from 0 to 1, of all entries together or of each parameter or module.
        scope: "global" to prune the least salient of all entries, or "layer" for the same share of each parameter or module.
        minimum: how many channels or heads a module keeps at least. A parameter may lose all of its weights.

    Raises:
        ArgumentError: for an amount outside [0, 1], or a saliency that does not fit the model: unknown names, other shapes, NaN.
            Nothing is pruned then.

    Example:
        >>> import torch
        >>> from torch_secorder.pruning import prune
        >>> layer = torch.nn.Linear(2, 2)
        >>> prune(layer, {"weight": torch.tensor([[1.0, 4.0], [3.0, 2.0]])}, amount=0.5)
        >>> layer.weight_mask
        tensor([[0., 1.],
                [1., 0.]])
    """
    share = require_share(amount)
    require_choice("scope", scope, ("global", "layer"))
    model = unwrapped(model)
    if not isinstance(saliency, Mapping) or not saliency:
        raise ArgumentError(
            "the saliency must be a mapping with an entry for each layer or weight, as weight_saliency() and Gates.saliency give "
            f"it, not {described(saliency)}"
        )
    if other := [name for name, scores in saliency.items() if not isinstance(scores, Tensor)]:
        raise ArgumentError(f"the saliency of {other[0]} must be a tensor, not {described(saliency[other[0]])}")
    if isinstance(minimum, bool) or not isinstance(minimum, int) or minimum < 0:
        raise ArgumentError(f"minimum must be a number of channels, not {minimum!r}")
    places: Mapping[str, GatePlace] = getattr(saliency, "places", {})
    targets = {name: _target(model, name, scores, places.get(name)) for name, scores in saliency.items()}
    if len({target.channels is None for target in targets.values()}) > 1:
        raise ArgumentError("saliencies of weights and of channels can't be compared; prune by one after the other")
    by_channel = next(iter(targets.values())).channels is not None
    left = {name: targets[name].unpruned(scores) for name, scores in saliency.items()}
    for name, mask in _kept(left, share, scope, minimum if by_channel else 0).items():
        new = [module for module in targets[name].modules if not torch_prune.is_pruned(module)]
        targets[name].mask(mask)
        for module in new:
            apply_where_called(model, module)


@dataclass(frozen=True)
class _Target:
    """What the scores of one name belong to.

    Attributes:
        module: the module that gets the masks.
        local: its parameter's name without pruning's suffix.
        channels: where the parameter counts the channels that have the scores; None if single entries have them.
        block: the number of channels that share a score.
        tied: other modules that have the same parameter, each with its name there; they get the mask, too.
        with_bias: whether the bias is pruned with the channels.
    """

    module: nn.Module
    local: str
    channels: ChannelSums | None = None
    block: int = 1
    with_bias: bool = False
    tied: Sequence[tuple[nn.Module, str]] = ()

    def unpruned(self, scores: Tensor) -> Tensor:
        """The scores, with minus infinity for what an existing mask has pruned."""
        mask = getattr(self.module, f"{self.local}_mask", None)
        scores = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
        if mask is None:
            return scores
        if self.channels is not None:
            mask = self.channels.of(mask).view(-1, self.block).sum(1)
        return scores.masked_fill(mask.to(scores.device) == 0, -torch.inf)

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that get masks."""
        return [self.module, *(module for module, _ in self.tied)]

    def mask(self, keep: Tensor) -> None:
        """Add masks with 1 for the entries that stay."""
        if self.channels is None:
            for module, local in ((self.module, self.local), *self.tied):
                torch_prune.custom_from_mask(module, local, keep)
            return
        weight: Any = self.module.weight
        keep = keep.repeat_interleave(self.block)
        torch_prune.custom_from_mask(self.module, "weight", self.channels.broadcast(keep, weight.shape))
        if self.with_bias and getattr(self.module, "bias", None) is not None:
            torch_prune.custom_from_mask(self.module, "bias", keep)


def _target(model: nn.Module, name: str, scores: Tensor, place: GatePlace | None) -> _Target:
    """The parameter that these scores prune."""
    if bool(torch.isnan(scores).any()):
        raise ArgumentError(f"the saliency of {name} has NaN")
    modules = {plain_name(key): module for key, module in model.named_modules(remove_duplicate=False)}
    owner, _, local = name.rpartition(".")
    parameter = modules[owner]._parameters.get(local) if owner in modules else None
    if parameter is not None:
        owners = [
            (module, _without_suffix(module, key))
            for module in dict.fromkeys((modules[owner], *model.modules()))
            for key, p in module._parameters.items()
            if p is parameter
        ]
        own = modules[owner], _without_suffix(modules[owner], local)
        expected, found = tuple(parameter.shape), _Target(*own, tied=[one for one in owners if one != own])
    elif name in modules and isinstance(getattr(modules[name], "weight", None), Tensor):
        expected, found = _target_of_gates(modules[name], name, place)
    else:
        raise ArgumentError(
            f"the saliency is of another model: {type(model).__name__} has no parameter or layer {name!r}"
        )
    if tuple(scores.shape) != expected:
        raise ArgumentError(f"the saliency of {name} has shape {tuple(scores.shape)}, but {expected} is needed")
    return found


def _without_suffix(module: nn.Module, local: str) -> str:
    """A parameter's name in its module, without the suffix that pruning gave it."""
    plain = local.removesuffix("_orig")
    return plain if hasattr(module, f"{plain}_mask") else local


def _target_of_gates(module: nn.Module, name: str, place: GatePlace | None) -> tuple[tuple[int, ...], _Target]:
    """The shape of a module's scores and what they prune; without a place, the scores are of its output channels."""
    if place is not None and not place.of_weights:
        raise ArgumentError(
            f"the gates of {name} are on axis {place.axis} of its {place.side}, where its weight has no channels to mask"
        )
    weight: Any = module.weight
    side = "output" if place is None else place.side
    axis = weight_axis(module, side) if weight.dim() > 1 else 0
    channels = ChannelSums(axis, int(getattr(module, "groups", 1)) if isinstance(module, ANY_CONVOLUTION) else 1)
    count = channels.length(weight.shape)
    gates = count if place is None or place.groups is None else place.groups
    if count % gates:
        raise ArgumentError(f"the {count} channels of {name} are no {gates} equal groups")
    with_bias = side == "output" and not isinstance(module, nn.Embedding)
    return (gates,), _Target(module, "weight", channels, count // gates, with_bias)


def _kept(saliency: Mapping[str, Tensor], share: float, scope: str, minimum: int) -> dict[str, Tensor]:
    """Masks with 1 for the entries that stay."""
    if scope == "layer":
        counts = {name: min(round(share * s.numel()), max(0, s.numel() - minimum)) for name, s in saliency.items()}
        return {name: _without_least(scores, counts[name]) for name, scores in saliency.items()}
    protected = {name: _best(scores, minimum) for name, scores in saliency.items()}
    flat = torch.cat(
        [on_host(scores).masked_fill(protected[name].cpu(), torch.inf).flatten() for name, scores in saliency.items()]
    )
    count = min(round(share * len(flat)), int((flat < torch.inf).sum()) if minimum else len(flat))
    masks = _without_least(flat, count).split([scores.numel() for scores in saliency.values()])
    return {name: mask.view_as(s).to(s.device) for mask, (name, s) in zip(masks, saliency.items(), strict=True)}


def _best(scores: Tensor, count: int) -> Tensor:
    best = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    best[scores.flatten().topk(min(count, scores.numel())).indices] = True
    return best.view_as(scores)


def _without_least(scores: Tensor, count: int) -> Tensor:
    mask = torch.ones(scores.numel(), dtype=torch.float32, device=scores.device)
    mask[scores.flatten().topk(count, largest=False).indices] = 0
    return mask.view_as(scores)
