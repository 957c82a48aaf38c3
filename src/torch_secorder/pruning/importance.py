"""The importance of groups of coupled channels; finding the groups is Torch-Pruning's task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_secorder.arguments import called_as
from torch_secorder.autograd.double_precision import on_host
from torch_secorder.errors import ArgumentError
from torch_secorder.model.channels import channel_axis
from torch_secorder.model.parameters import named_modules, unwrapped

# What all batch norms and instance norms derive from.
_NORMS: Any = (nn.BatchNorm1d.__base__, nn.InstanceNorm1d.__base__)


class GroupImportance:
    """The importance of coupled channels, as Torch-Pruning's pruners ask for it (``importance=``).

    Channels that are coupled through skip connections or depthwise convolutions have to go together; finding them is that
    package's task. A group's importance is the sum of the saliencies of the gates on its members' outputs. Where norms of
    the group are watched, they stand for the layers in front of them.

    Args:
        model: the model that the pruner changes. Names are looked up once, so make this before pruning.
        saliency: :attr:`Gates.saliency`, or a saliency by parameter (:func:`weight_saliency`). With the latter, a channel's
            importance is the sum over all weights that are pruned with it, including those that read the channel.

    Raises:
        ArgumentError: if names or shapes are not the model's; when called, if a group has no member with a saliency.

    Example:
        >>> import torch
        >>> from torch_secorder.pruning import Gates, GroupImportance
        >>> layers = torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten()
        >>> model = torch.nn.Sequential(*layers, torch.nn.Linear(16, 3))
        >>> with Gates(model, fisher="sampled") as gates:
        ...     outputs = model(torch.randn(8, 1, 4, 4))
        ...     labels = torch.distributions.Categorical(logits=outputs).sample()
        ...     torch.nn.functional.cross_entropy(outputs, labels).backward()
        >>> # for tp.pruner.BasePruner(model, x, importance=importance, ...)
        >>> importance = GroupImportance(model, gates.saliency)

    Source:
        Fang et al. (2023), "DepGraph: towards any structural pruning".
    """

    @called_as("GroupImportance(model, gates.saliency), or with weight_saliency(model, monitor)")
    def __init__(self, model: nn.Module, saliency: Mapping[str, Tensor]):
        model = unwrapped(model)
        self._channels: dict[nn.Module, Tensor] = {}
        self._weights: dict[tuple[nn.Module, str], Tensor] = {}
        modules = dict(named_modules(model))
        for name, place in getattr(saliency, "places", {}).items():
            if name in saliency and (place.side, place.groups) != ("output", None):
                raise ArgumentError(
                    f"{name} has gates on its {place.side}, for blocks of channels or not; a group's importance takes gates on "
                    "outputs, one for each channel"
                )
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
        if norms := [entry for entry in found if isinstance(entry[0], _NORMS) and entry[0] in self._channels]:
            found = norms
        if not found:
            names = ", ".join(sorted({type(module).__name__ for module, *_ in members}))
            raise ArgumentError(
                f"no member of the group ({names}) has a saliency; watch these modules, or ignore the layer"
            )
        total = torch.zeros(size, dtype=torch.float64, device="cpu")
        for _, scores, roots in found:
            total.index_add_(0, torch.tensor(roots, device="cpu"), on_host(scores))
        return total

    def _scores(self, module: nn.Module, way: str, idxs: list[int]) -> Tensor | None:
        """The importance of the member's channels ``idxs``, or None if the member has no saliency."""
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


def _items(group: Any) -> list[Any]:
    return [group[position] for position in range(len(group))]


def _roots(item: Any) -> list[int]:
    roots = item.root_idxs if item.root_idxs is not None else item.idxs
    return [] if any(root is None for root in roots) else [int(root) for root in roots]


def _way(handler: Any) -> str:
    """Whether Torch-Pruning's function cuts a member's outputs or its inputs."""
    name = getattr(handler, "__name__", "")
    return "in" if name.startswith("prune_in") or "in_channels" in name else "out"
