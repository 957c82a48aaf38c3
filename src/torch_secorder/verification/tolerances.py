"""How far two correct results may differ: every tolerance of the checks, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torch_secorder.autograd.product_bits import BF16, DOUBLE, SINGLE, TF32, product_bits


@dataclass(frozen=True)
class Tolerance:
    """Bounds for the difference of two squared norms.

    Attributes:
        relative: as a fraction of the larger one.
        of_total: as a fraction of the sum over all parameters, for a norm that is small beside others.
        of_total_for_zero: the same for a norm that is exactly zero in the analysis. If autograd finds more than the rounding of a
            gradient that vanishes by symmetry (the bias of attention's keys), something was left out.
        of_largest: as a fraction of the largest sample's sum over all parameters, for a sample whose whole gradient cancels (a
            pair of the same item): nothing of its own says how large the terms were.
    """

    relative: float
    of_total: float
    of_total_for_zero: float
    of_largest: float


# One sample alone against the same sample in its batch. Kernels round differently for one row than for many, and each layer
# passes the difference on; it stays below these bounds in networks of a hundred layers. An error in principle (a term that is
# left out, samples that influence each other, the wrong axis) shifts some norm by several percent. Models in float64 have parts
# in float32 (the norms of language models), so float64 has no smaller bound. A rounding error of eps in a gradient that should be
# zero is eps^2 of the total here: 1e-14 in float32, 1e-32 in float64; the bounds leave room for sums of many terms. A layer may
# amplify it (the norm of nearly equal numbers, by 1 / sqrt(eps)); its size is then measured before anything is refused.
# bfloat16 has 8 bits: each number is off by up to 2^-9, a norm by one or two percent, and a small gradient by all of its size.
# TF32 has 11 bits and rounds only factors; but for one sample cuDNN takes other algorithms than for many, some of which round
# intermediate results: the sixteen convolutions of a ResNet were off by 3 percent on an H100. Its share of the total, which goes
# by eps^2, is a tenth of bfloat16's. A sample is not excused by others where rounding is that large.
_SAMPLE_ALONE = {
    DOUBLE: Tolerance(1e-6, 1e-12, 1e-20, 1e-20),
    SINGLE: Tolerance(1e-3, 1e-7, 1e-12, 1e-12),
    TF32: Tolerance(5e-2, 1e-4, 1e-4, 0.0),
    BF16: Tolerance(5e-2, 1e-3, 1e-3, 0.0),
}


def sample_alone(bits: int) -> Tolerance:
    """The tolerance for a sample's squared norms, by the precision of the products that its gradients are sums of."""
    return _SAMPLE_ALONE[bits]


# Outputs that differ only by rounding: by up to a hundred times eps, relative to the largest.
ROUNDED_OUTPUTS = 100

# A quantized layer may add up integer products, which rounds differently from the product with the numbers that its codes stand
# for. A layer that also quantizes its input is another function, which differs by several percent.
DEQUANTIZED_OUTPUTS = 1e-4

# A separable loss gives a sample the same gradient, bit for bit, whatever the other samples' outputs are. A few bits may differ
# if other vector instructions are used.
SEPARABLE_LOSS = 1e-3

# An entry of one sample keeps its derivative, up to the sign, when other samples' directions change; relative to the largest.
MIXED_ENTRIES = {DOUBLE: 1e-4, SINGLE: 1e-4, TF32: 1.25e-2, BF16: 5e-2}

# A gradient that is nearly zero beside the largest one is mostly rounding error; relative to the largest.
ROUNDED_GRADIENT = 1e-3

# The loss of some samples together against their weighted losses alone, as a fraction of the sum of the parts' sizes. The weights
# are roots of ratios of sums of squared norms, which agree to 1e-3 in float32 and to 5e-2 in half precision.
OWN_LOSS_OF_SEVERAL = {DOUBLE: 1e-3, SINGLE: 1e-3, TF32: 1.25e-2, BF16: 5e-2}

# The same for the gradient of that loss, as a fraction of the root of the sum of its parts' squared norms.
OWN_GRADIENT_OF_SEVERAL = {DOUBLE: 1e-2, SINGLE: 1e-2, TF32: 5e-2, BF16: 2e-1}

# Captured gradients, summed over samples, against autograd's own, along one direction, as a fraction of the summands' size. Both
# are sums of the same products in different orders. A GPU may multiply float32 numbers with 11 bits (TF32), and add up in another
# order each time. Autograd's gradient in half precision is rounded to 8 bits, and some CPUs multiply with 8 bits.
_GRADIENT_SUMS = {(torch.float64, "cpu"): 1e-8, (torch.float32, "cpu"): 1e-4, (torch.float64, "cuda"): 1e-6}
_GRADIENT_SUMS_ELSEWHERE = 1e-2
_GRADIENT_SUMS_IN_HALF_PRECISION = 5e-2

# A gradient that is zero up to rounding has the rounding error of the terms that cancel in it; their size is estimated from the
# other parameters' gradients.
GRADIENT_SUMS_FLOOR = 1e-2


def gradient_sum(dtype: torch.dtype, device_type: str, half: bool) -> float:
    """The tolerance for sums in ``dtype`` on a device; ``half`` if some gradients are in half precision."""
    single = dtype not in (torch.float64, torch.complex128)
    if half or (single and product_bits(device_type) == BF16):
        return _GRADIENT_SUMS_IN_HALF_PRECISION
    return _GRADIENT_SUMS.get((dtype, device_type), _GRADIENT_SUMS_ELSEWHERE)
