"""Weights after rounding to few bits and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from torch_secorder.arguments import Grain, Scheme, called_as, require_choice, require_positive_int
from torch_secorder.errors import ArgumentError
from torch_secorder.model.channels import channel_axis
from torch_secorder.model.names import plain_name
from torch_secorder.model.parameters import named_modules, unwrapped

if TYPE_CHECKING:
    import pandas as pd

RoundingFunction = Callable[[Tensor, int], Tensor]  # from a weight and a number of bits to the rounded weight


@called_as("rounded(weight, bits)")
def rounded(
    weight: Tensor,
    bits: int,
    scheme: Scheme = "symmetric",
    per: Grain = "tensor",
    axis: int = 0,
    group_size: int | None = None,
) -> Tensor:
    r"""The weight after rounding to ``bits`` bits and back, in its own shape and dtype.

    With s the step, ``symmetric`` has the levels of a signed integer without its lowest, and ``affine`` those of an unsigned
    integer with a zero point z, so that 0 stays 0 in both:

    .. math::

       \hat w &= s\, \operatorname{round}(w / s), & s &= \max|w| / (2^{b-1} - 1) \\
       \hat w &= s\, (\operatorname{clamp}(\operatorname{round}(w / s) + z,\ 0,\ 2^b - 1) - z), &
       s &= (h - l) / (2^b - 1),\quad z = \operatorname{round}(-l / s)

    with :math:`l = \min(0, \min w)` and :math:`h = \max(0, \max w)`. One symmetric bit is the sign times the mean of
    ``|w|``, the nearest two levels of opposite sign. Halves go to the even integer, as in :func:`torch.round`.

    Args:
        weight: the tensor to round; it stays as it is.
        bits: the number of bits, 1 to 16.
        scheme: "symmetric" or "affine".
        per: one step for the "tensor", one for each "channel", or one for each "group" of ``group_size`` consecutive entries of a
            channel; the last group may have fewer. Tensors with fewer than two axes always have one step.
        axis: the axis of the channels.
        group_size: the size of groups for ``per="group"``, such as 128.

    Raises:
        ArgumentError: for bits outside 1..16, an unknown scheme, a group size without groups or groups without one, or weights
            that are not finite or no floating-point numbers.

    Example:
        >>> import torch
        >>> from torch_secorder.quantization import rounded
        >>> rounded(torch.tensor([-1.0, 0.2, 0.6, 0.9]), bits=2)
        tensor([-1.,  0.,  1.,  1.])

    Source:
        Jacob et al. (2018), "Quantization and training of neural networks for efficient integer-arithmetic-only inference";
        one bit: Rastegari et al. (2016), "XNOR-Net".
    """
    bits = checked_bits(bits)
    require_choice("scheme", scheme, get_args(Scheme))
    _check_grain(per, group_size)
    if not weight.numel():
        return weight.clone()
    if group_size is not None and weight.dim() > 1:
        return _rounded_in_groups(weight, bits, scheme, axis, group_size)
    _require_floating_point("weight", weight)
    w = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if not bool(torch.isfinite(w).all()):
        raise ArgumentError("weights that are infinite or NaN can't be rounded")
    axes = [a for a in range(w.dim()) if per == "tensor" or w.dim() < 2 or a != axis % w.dim()]
    if scheme == "symmetric" and bits == 1:
        size = _over(axes, w.abs(), torch.mean)
        return torch.where(w < 0, -size, size).to(weight.dtype)
    if scheme == "symmetric":
        top = 2 ** (bits - 1) - 1
        step = _over(axes, w.abs(), torch.amax) / top
        low, zero = -top, torch.zeros_like(step)
    else:
        top, low = 2**bits - 1, 0
        bottom = _over(axes, w, torch.amin).clamp(max=0)
        step = (_over(axes, w, torch.amax).clamp(min=0) - bottom) / top
        zero = torch.where(step > 0, (-bottom / step).round(), 0.0)
    levels = ((w / step).round() + zero).clamp(low, top) - zero
    return torch.where(step > 0, levels * step, w).to(weight.dtype)


def _require_floating_point(name: str, weight: Tensor) -> None:
    if not weight.is_floating_point():
        raise ArgumentError(
            f"{name} holds {weight.dtype} and no floating-point numbers, which alone can be rounded to fewer bits: leave it out, "
            "by a mapping of names to bits for quantized() or parameters= of quantization_sensitivity(), or dequantize it"
        )


def _check_grain(per: Grain, group_size: int | None) -> None:
    require_choice("per", per, get_args(Grain))
    if (per == "group") != (group_size is not None):
        raise ArgumentError(f'per="group" and group_size= belong together; there are per={per!r} and {group_size=}')
    if group_size is not None:
        require_positive_int("group_size", group_size)


def _rounded_in_groups(weight: Tensor, bits: int, scheme: Scheme, axis: int, size: int) -> Tensor:
    """The weight after rounding with one step for each group of ``size`` entries of a channel."""
    moved = weight.movedim(axis, 0)
    channels = moved.flatten(1)
    whole = channels.shape[1] // size * size
    groups = channels[:, :whole].reshape(-1, size)
    parts = [rounded(groups, bits, scheme, "channel").view(len(channels), whole)]
    parts.append(rounded(channels[:, whole:], bits, scheme, "channel"))
    return torch.cat(parts, 1).view(moved.shape).movedim(0, axis)


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded: by :func:`rounded`, or by a function of the user.

    Attributes:
        scheme: as for :func:`rounded`.
        per: as for :func:`rounded`.
        group_size: as for :func:`rounded`.
        function: the user's function, which replaces :func:`rounded`.
    """

    scheme: Scheme = "symmetric"
    per: Grain = "channel"
    group_size: int | None = None
    function: RoundingFunction | None = None

    def __post_init__(self) -> None:
        require_choice("scheme", self.scheme, get_args(Scheme))
        _check_grain(self.per, self.group_size)
        if self.function is None:
            return
        if not callable(self.function):
            raise ArgumentError(f"rounding must be a function of (weight, bits), not {self.function!r:.80}")
        if self.group_size is not None:
            raise ArgumentError("rounding= is a function that makes its own groups: leave out per= and group_size=")

    def of(self, name: str, weight: Tensor, bits: int, axis: int) -> Tensor:
        """A weight after rounding.

        Raises:
            ArgumentError: if the user's function returns no finite tensor of the weight's shape.
        """
        if self.function is None:
            _require_floating_point(name, weight)
            return rounded(weight, bits, self.scheme, self.per, axis, self.group_size)
        found = self.function(weight.detach().clone(), checked_bits(bits))
        if not isinstance(found, Tensor) or found.shape != weight.shape or not bool(found.isfinite().all()):
            what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ArgumentError(
                f"rounding({name}, {bits}) must return a finite tensor of the weight's shape {tuple(weight.shape)}, not {what}"
            )
        return found.to(weight.device)

    @property
    def facts(self) -> dict[str, str | int]:
        """The facts that a table's ``attrs`` hold about the rounding."""
        if self.function is not None:
            return {"scheme": getattr(self.function, "__name__", type(self.function).__name__), "per": "rounding"}
        size = {} if self.group_size is None else {"group_size": self.group_size}
        return {"scheme": self.scheme, "per": self.per, **size}


@called_as(
    "with quantized(model, bits): where bits is a number, name -> number, or what allocate_bits returned",
    report="pass bits=allocate_bits(quantization_sensitivity(model, report), budget)",
)
@contextmanager
def quantized(
    model: nn.Module,
    bits: int | Mapping[str, int] | pd.DataFrame,
    scheme: Scheme = "symmetric",
    per: Grain = "channel",
    *,
    group_size: int | None = None,
    rounding: RoundingFunction | None = None,
) -> Iterator[nn.Module]:
    """A context in which the model's weights are rounded; on leaving it, they are bit for bit what they were.

    Args:
        model: the model.
        bits: a number for all parameters with two or more axes, a mapping by names, or a table from :func:`allocate_bits`.
        scheme: "symmetric" or "affine".
        per: "tensor", "channel", or "group" with a ``group_size``, as for :func:`rounded`.
        group_size: the size of groups, as for :func:`rounded`.
        rounding: a function from a weight and its bits to the rounded weight, which replaces :func:`rounded`.

    Raises:
        ArgumentError: for bits outside 1..16, or names that the model lacks.

    Example:
        >>> import torch
        >>> from torch_secorder.quantization import quantized
        >>> model = torch.nn.Linear(4, 3)
        >>> with quantized(model, bits=2):
        ...     print(len(model.weight[0].unique()) <= 3)
        True
    """
    module, way = unwrapped(model), Rounding(scheme, per, group_size, rounding)
    named = {plain_name(name): p for name, p in module.named_parameters()}
    given: Any = bits  # Type checkers know no NumPy integers.
    if isinstance(given, Integral):
        chosen = dict.fromkeys((name for name, p in named.items() if p.dim() > 1), checked_bits(given))
    elif isinstance(given, Mapping) or "bits" in getattr(given, "columns", ()):
        chosen = {str(name): b for name, b in (given if isinstance(given, Mapping) else given["bits"]).items()}
        untouched = getattr(given, "attrs", {}).get("not_rounded", ())
        chosen = {name: b for name, b in chosen.items() if name not in untouched}
    else:
        raise ArgumentError(f"bits must be a number, a mapping, or what allocate_bits() returned, not {bits!r:.50}")
    if unknown := sorted(set(chosen) - set(named)):
        raise ArgumentError(f"{type(module).__name__} has no parameter {', '.join(unknown)}")
    owners = dict(named_modules(module))
    differentiates = torch.is_grad_enabled()
    with torch.no_grad():
        new = {
            name: way.of(name, named[name], b, channel_axis(owners.get(name.rpartition(".")[0], module)))
            for name, b in chosen.items()
        }
        old = {name: named[name].clone() for name in chosen}
        try:
            for name, value in new.items():
                named[name].copy_(value)
            with torch.set_grad_enabled(differentiates):
                yield model
        finally:
            for name, value in old.items():
                named[name].copy_(value)


def checked_bits(bits: Any) -> int:
    """Bits that are an int from 1 to 16.

    Raises:
        ArgumentError: for anything else.
    """
    if isinstance(bits, bool) or not isinstance(bits, Integral) or not 1 <= int(bits) <= 16:
        raise ArgumentError(f"bits must be whole numbers from 1 to 16, not {bits!r}")
    return int(bits)


def _over(axes: list[int], w: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    return reduce(w, dim=axes, keepdim=True) if axes else w
