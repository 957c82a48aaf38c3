"""How far two right answers may be apart: every tolerance of the checks, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torch_secorder.autograd.product_bits import BF16, DOUBLE, SINGLE, TF32, product_bits


@dataclass(frozen=True)
class Tolerance:
    """Bounds for the difference of two squared norms.

    Attributes:
        relative: as a fraction of the larger one.
        of_total: as a fraction of the sum over all parameters, for one that is small beside others.
        of_total_for_zero: the same where an analysis says exactly zero: that is an omission if autograd finds more than the
            rounding of a gradient that vanishes by symmetry (the bias of attention's keys).
    """

    relative: float
    of_total: float
    of_total_for_zero: float


# One sample alone against the same sample in its batch. Kernels round differently for one row than for many, and each layer
# passes the difference on: that stays below the bounds in networks of a hundred layers. Whatever is wrong in principle (a term
# left out, samples that influence each other, the wrong axis) shifts some norm by per cents. Models in float64 have parts in
# float32 (the norms of language models), which is why float64 has no smaller bound. A rounding error of eps in a
# gradient that should be zero is eps^2 of the total here: 1e-14 in float32, 1e-32 in float64, with room for sums of many. Where
# a layer amplifies it (the norm of nearly equal numbers, by 1 / sqrt(eps)), how large it is there is tried before a refusal.
# bfloat16 has 8 bits: each number is off by up to 2^-9, a norm by a per cent or two, a small gradient by all that it is. TF32 has
# 11 bits, and rounds what is multiplied only; but for one sample cuDNN takes other algorithms than for many, some of which round
# in between: the sixteen convolutions of a ResNet were off by 3 per cent on an H100. It is a tenth for what is eps^2.
_SAMPLE_ALONE = {
    DOUBLE: Tolerance(1e-6, 1e-12, 1e-20),
    SINGLE: Tolerance(1e-3, 1e-7, 1e-12),
    TF32: Tolerance(5e-2, 1e-4, 1e-4),
    BF16: Tolerance(5e-2, 1e-3, 1e-3),
}


def sample_alone(bits: int) -> Tolerance:
    """For a sample's squared norms, by the bits of the numbers that its gradients are sums of."""
    return _SAMPLE_ALONE[bits]


# Outputs that differ by rounding alone: a hundred times the distance of two neighboring numbers, in units of the largest.
ROUNDED_OUTPUTS = 100

# A quantized layer may add up integer products, which rounds differently from the product with what its codes stand for. One
# that also quantizes its input is another function, which differs by per cents.
DEQUANTIZED_OUTPUTS = 1e-4

# A loss that takes samples apart gives a sample the same gradient, bit for bit, whatever the other samples' outputs
# are; other vector instructions for other numbers cost some bits.
SEPARABLE_LOSS = 1e-3

# An entry of one sample keeps its derivative, or its negative, when other samples' directions change; relative to the largest.
MIXED_ENTRIES = {DOUBLE: 1e-4, SINGLE: 1e-4, TF32: 1.25e-2, BF16: 5e-2}

# A sample whose gradient is nearly zero beside the largest has little but rounding, as a part of that.
ROUNDED_GRADIENT = 1e-3

# The loss of some samples together against what their losses alone and their weights say. The weights are roots of ratios of sums
# of squared norms, which agree to 1e-3 in float32 and to 5e-2 in half precision, as a fraction of the sum of the parts' sizes.
OWN_LOSS_OF_SEVERAL = {DOUBLE: 1e-3, SINGLE: 1e-3, TF32: 1.25e-2, BF16: 5e-2}

# The same for the gradient of that loss, as a fraction of the root of the sum of its parts' squared norms.
OWN_GRADIENT_OF_SEVERAL = {DOUBLE: 1e-2, SINGLE: 1e-2, TF32: 5e-2, BF16: 2e-1}

# Captured gradients, summed over samples, against autograd's own, along one direction, as a fraction of what was added up. Both
# are the same products in another order. A GPU may multiply float32 numbers with 11 bits (TF32), and add up in another order each
# time; autograd's gradient in half precision is rounded to 8 bits, and some CPUs multiply with as many.
_GRADIENT_SUMS = {(torch.float64, "cpu"): 1e-8, (torch.float32, "cpu"): 1e-4, (torch.float64, "cuda"): 1e-6}
_GRADIENT_SUMS_ELSEWHERE = 1e-2
_GRADIENT_SUMS_IN_HALF_PRECISION = 5e-2

# A gradient that is zero but for rounding is rounded like the terms that cancel in it, of which the other parameters'
# gradients give an idea.
GRADIENT_SUMS_FLOOR = 1e-2


def gradient_sum(dtype: torch.dtype, device_type: str, half: bool) -> float:
    """For sums in ``dtype`` on a device, of gradients in half precision or not."""
    single = dtype not in (torch.float64, torch.complex128)
    if half or (single and product_bits(device_type) == BF16):
        return _GRADIENT_SUMS_IN_HALF_PRECISION
    return _GRADIENT_SUMS.get((dtype, device_type), _GRADIENT_SUMS_ELSEWHERE)
