"""The comparison that all checks use: a sample's squared norms in its batch against those of the sample alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_secorder.errors import VerificationError
from torch_secorder.verification.tolerances import sample_alone

SHOWN = 8  # parameters in an error's text


def require_equal_norms(
    names: Sequence[str],
    in_batch: Tensor,
    alone: Tensor,
    *,
    bits: int,
    rounding: Tensor | float = 0.0,
    sample: int = 0,
) -> None:
    """Raise unless a sample has the same squared norms in its batch and alone.

    Args:
        names: the parameters' names.
        in_batch: ``[parameters]``, the sample's squared norms from the analysis of the batch.
        alone: ``[parameters]``, the sample's squared norms by plain autograd for the sample alone.
        bits: the precision of the products that the gradients are sums of.
        rounding: ``[parameters]``, by how much more the two may differ.
        sample: the sample's number in its batch.

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
            "(batch_axis=), or a rule is wrong; verify=False returns the numbers unchecked"
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
