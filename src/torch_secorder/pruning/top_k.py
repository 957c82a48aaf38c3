"""Masks of the weights that carry the most Fisher information."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from torch_secorder.arguments import called_as, require_share
from torch_secorder.autograd.double_precision import on_host
from torch_secorder.errors import ArgumentError


@called_as("top_k_mask(diagonal, share), where diagonal is results.diagonal or weight_saliency(model, results)")
def top_k_mask(diagonal: Mapping[str, Tensor], share: float, *, always: str | Iterable[str] = ()) -> dict[str, Tensor]:
    """Boolean masks of the entries with the largest values of all, for sparse fine-tuning or to protect these entries.

    Args:
        diagonal: name -> values, such as ``results.diagonal`` or the result of :func:`weight_saliency`.
        share: the share to take of all entries that ``always`` does not name, ``round(share * number)`` of them. Among equal
            values at the boundary, as many are taken as are still needed.
        always: patterns of names whose entries are all taken, such as ``"classifier.*"`` or ``"*.bias"``.

    Returns:
        Name -> a mask of the values' shape, on their device.

    Raises:
        ArgumentError: for a share outside [0, 1], values that are NaN, or a pattern that no name matches.

    Example:
        >>> import torch
        >>> from torch_secorder.pruning import top_k_mask
        >>> weight, bias = torch.tensor([[4.0, 1.0], [2.0, 3.0]]), torch.tensor([0.5, 0.5])
        >>> diagonal = {"weight": weight, "bias": bias}
        >>> top_k_mask(diagonal, 0.5, always="bias")
        {'weight': tensor([[ True, False],
                [False,  True]]), 'bias': tensor([True, True])}

    Source:
        Sung, Nair and Raffel (2021), "Training neural networks with fixed sparse masks".
    """
    require_share(share, "share")
    if not isinstance(diagonal, Mapping) or not all(isinstance(value, Tensor) for value in diagonal.values()):
        raise ArgumentError("diagonal must be a mapping from names to tensors, such as results.diagonal")
    whole: set[str] = set()
    for pattern in [always] if isinstance(always, str) else always:
        found = {name for name in diagonal if fnmatchcase(name, str(pattern))}
        if not found:
            raise ArgumentError(f"always: no name matches {pattern!r}")
        whole |= found
    rest = {name: value.detach() for name, value in diagonal.items() if name not in whole}
    if bad := [name for name, value in rest.items() if bool(value.isnan().any())]:
        raise ArgumentError(f"the diagonal of {bad[0]} has NaN")
    some = _largest(rest, share)
    return {
        name: some[name] if name in some else torch.ones_like(value, dtype=torch.bool)
        for name, value in diagonal.items()
    }


def _largest(values: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    if not values:
        return {}
    flat = torch.cat([on_host(value).flatten() for value in values.values()])
    mask = torch.zeros(len(flat), dtype=torch.bool, device="cpu")
    mask[flat.topk(round(share * len(flat)), sorted=False).indices] = True
    parts = mask.split([value.numel() for value in values.values()])
    return {
        name: part.view(value.shape).to(value.device) for part, (name, value) in zip(parts, values.items(), strict=True)
    }
