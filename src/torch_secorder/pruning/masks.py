"""Taking the cheapest away, through PyTorch's own masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from torch_secorder.arguments import require_choice, require_share
from torch_secorder.errors import ArgumentError
from torch_secorder.model.channels import channel_axis
from torch_secorder.model.parameters import plain_name, unwrapped


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
    share = require_share(amount)
    require_choice("scope", scope, ("global", "layer"))
    model = unwrapped(model)
    if not isinstance(saliency, Mapping) or not saliency:
        raise ArgumentError("the saliency has no entry; pass what weight_saliency() or ChannelGates.saliency gave")
    if isinstance(minimum, bool) or not isinstance(minimum, int) or minimum < 0:
        raise ArgumentError(f"minimum must be a number of channels, not {minimum!r}")
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
