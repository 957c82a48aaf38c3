"""The comparisons that all checks use: a sample's squared norms and outputs in its batch against those of the sample alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_secorder.autograd.precision import is_half
from torch_secorder.errors import VerificationError
from torch_secorder.model.containers import is_continuous, parts, tensors
from torch_secorder.model.nested import whole
from torch_secorder.verification.tolerances import ROUNDED_OUTPUTS, sample_alone

SHOWN = 8  # parameters in an error's text


def require_equal_norms(
    names: Sequence[str],
    in_batch: Tensor,
    alone: Tensor,
    *,
    bits: int,
    rounding: Tensor | float = 0.0,
    sample: int = 0,
    unchecked: str = "verify=False returns the numbers unchecked",
) -> None:
    """Raise unless a sample has the same squared norms in its batch and alone.

    Args:
        names: the parameters' names.
        in_batch: ``[parameters]``, the sample's squared norms from the analysis of the batch.
        alone: ``[parameters]``, the sample's squared norms by plain autograd for the sample alone.
        bits: the precision of the products that the gradients are sums of.
        rounding: ``[parameters]``, by how much more the two may differ.
        sample: the sample's number in its batch.
        unchecked: what else the reason may be where this is called, and how to do without the check.

    Raises:
        VerificationError: naming the parameters that differ, with both numbers.
    """
    if wrong := unequal_norms(in_batch, alone, bits=bits, rounding=rounding):
        lines = [f"{names[i]}: {in_batch[i]:.10g} in its batch, {alone[i]:.10g} alone" for i in wrong[:SHOWN]]
        lines += [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        raise VerificationError(
            f"sample {sample}: its squared gradient norms differ from those that plain autograd gives for that sample alone:\n  "
            + "\n  ".join(lines)
            + "\neither samples influence each other (batch statistics, a loss that compares samples), or the loss depends on "
            "parameters outside of the model's outputs (a weight penalty), or the batch is not on the axis assumed "
            f"(batch_axis=), or a rule is wrong; {unchecked}"
        )


def unequal_norms(in_batch: Tensor, alone: Tensor, *, bits: int, rounding: Tensor | float = 0.0) -> list[int]:
    """The positions at which two rows of squared norms differ by more than rounding. Numbers that are not finite differ."""
    tolerance = sample_alone(bits)
    in_batch, alone = in_batch.cpu().double(), alone.cpu().double()
    total = alone[alone.isfinite()].sum()
    of_total = torch.full_like(alone, tolerance.of_total)
    of_total[in_batch == 0] = tolerance.of_total_for_zero
    bound = tolerance.relative * torch.maximum(in_batch, alone) + of_total * total + rounding
    finite = in_batch.isfinite() & alone.isfinite()
    equal = finite & ((in_batch - alone).abs() <= bound)
    return (~equal).nonzero().flatten().tolist()


def rounding_beside_others(norms: Tensor, *, bits: int) -> float:
    """By how much a sample's squared norms may differ that are only rounding beside the largest of ``[parameters, samples]``."""
    sums = norms.detach().sum(0).cpu().double()
    sums = sums[sums.isfinite()]
    return sample_alone(bits).of_largest * float(sums.max()) if len(sums) else 0.0


def differ_by_rounding(x: Tensor, y: Tensor) -> bool:
    """Whether two outputs are the same up to rounding."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if not is_continuous(x) or not x.numel():
        return True
    x, y = whole(x), whole(y)
    return bool((x - y).abs().max() <= ROUNDED_OUTPUTS * torch.finfo(x.dtype).eps * y.abs().max())


def are_same(own: Any, in_batch: Any) -> bool:
    """Whether a sample has the same outputs alone as in its batch, under the same names, up to rounding."""
    mine, others = tensors(own), tensors(in_batch)
    if len(mine) != len(others) or [key for key, _ in parts(own)] != [key for key, _ in parts(in_batch)]:
        return False
    return all(_is_same(x.detach(), y) for x, y in zip(mine, others, strict=True))


def _is_same(x: Tensor, y: Tensor) -> bool:
    """The same, but what is half-precision rounding may be more than that: there, all numbers have to be equal."""
    return torch.equal(x, y) if is_half(y) and x.shape == y.shape else differ_by_rounding(x, y)
