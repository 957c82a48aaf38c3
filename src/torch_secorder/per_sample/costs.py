"""The cost of each way to a convolution's squared norms: amounts of work times a few measured constants.

With these constants, ``shifted`` wins for kernels of one, for large depthwise ones and for kernels of three on images, ``gram``
for small maps (up to about 16 x 16) with 64 channels or more, ``patches`` for a single position, and ``direct`` for most others.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from torch_secorder.per_sample.profiles import CPU, DeviceProfile

BUDGET = CPU.convolution_bytes
# On a CPU, a form whose temporaries for a single sample are larger than this is not offered.
LIMIT = 4 * BUDGET

# How many rows fill a vector register in single precision with AVX-512.
FILLED = 16
# With so few input channels, kernels of so many taps and so many numbers in one sample's patches, torch's weight gradients of
# one sample at a time take about half as long as those of several samples as groups (measured with AVX-512).
FEW_CHANNELS, LARGE_KERNEL, MANY_UNFOLDED = 3, 25, 2**16

Counts = dict[str, float]
FORMS = ("direct", "shifted", "gram", "patches")

# Nanoseconds for each piece of work in float32 on one thread, fitted by tests/benchmarks/convolution_cost.py to times with
# AVX-512 and with AVX2 together. Those of "direct" and "shifted" lie between that fit and one to a processor of another maker,
# on which oneDNN's convolutions gain more by AVX-512 than the matrix products do. There, the form that they pick took 1.01 times
# as long as the best one on average; the processors of the fit were not tried again. Only the ratios of these numbers matter.
NANOSECONDS: dict[str, Counts] = {
    "direct": {
        "calls": 1.25e5,
        "alone": 4e4,
        "multiply": 0.017,
        "outputs": 0.55,
        "groups": 24,
        "factors": 0.44,
        "depthwise": 0.026,
        "unfolded": 0.76,
        "runs": 2.7,
        "loops": 120,
    },
    "shifted": {
        "calls": 4e4,
        "products": 45,
        "multiply": 0.0215,
        "packed": 0.08,
        "outputs": 0.26,
        "copied": 0.57,
        "runs": 0.06,
    },
    "gram": {"calls": 3e4, "products": 54, "multiply": 0.013, "added": 0.18, "runs": 5.2, "packed": 0.48},
    "patches": {"calls": 2.5e4, "products": 81, "multiply": 0.013, "copied": 1.0, "runs": 9.0, "packed": 0.03},
}

# The same for accelerators, fitted to times on one NVIDIA H200 with torch 2.11, most of which are the cost of starting a call.
# The form that they pick takes 1.13 times as long as the best one on average, and 1.7 times at most. cuDNN takes the groups of
# "direct" in turn for some sizes, in up to 130 kernels, and at once for others, of which nothing tells beforehand: what that
# costs each sample was not fitted, but set so that the forms with few kernels win where they are nearly as fast.
OF_ACCELERATORS: dict[str, Counts] = {
    "direct": {
        "blocks": 9e4,
        "calls": 1.4e5,
        "multiply": 1.1e-4,
        "outputs": 6.8e-3,
        "factors": 2.6e-4,
        "depthwise": 4.7e-5,
        "unfolded": 3.2e-5,
        "in turn": 5e3,
    },
    "shifted": {"blocks": 1.9e5, "calls": 3.4e4, "multiply": 8e-6, "packed": 1.7e-3, "outputs": 1.5e-3, "copied": 8e-4},
    "gram": {"blocks": 2.6e5, "calls": 1.4e4, "multiply": 3.2e-6, "added": 2.1e-5, "packed": 1.3e-4},
    "patches": {"calls": 8e4, "multiply": 1.5e-4, "copied": 1.4e-2, "packed": 3.3e-3},
}


class Sizes(NamedTuple):
    """A convolution's sizes: n samples of r maps, k groups of ``i`` channels in and ``o`` channels out."""

    n: int
    r: int
    k: int
    i: int
    o: int
    map: tuple[int, ...]
    out: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    itemsize: int
    budget: int = BUDGET  # bytes of temporaries at once
    profile: DeviceProfile = CPU

    @property
    def positions(self) -> int:
        """Positions that share the weight."""
        return self.r * math.prod(self.out)

    @property
    def padded(self) -> tuple[int, ...]:
        """The map with its padding."""
        return tuple(size + 2 * p for size, p in zip(self.map, self.padding, strict=True))

    @property
    def depthwise(self) -> bool:
        """Whether torch has code of its own for this: one channel in each group and a small kernel."""
        return self.i == self.o == 1 and max(self.kernel) <= 3 <= min(self.map)

    @property
    def few_channels(self) -> bool:
        """Whether a CPU's code for few input channels, as those of images, applies to a single sample; it knows no groups."""
        return self.r == self.k == 1 and self.i <= FEW_CHANNELS and self.profile.has_caches

    @property
    def one_by_one(self) -> bool:
        """Whether torch's own weight gradient is called for one sample at a time.

        Small kernels and small maps gain less by the code for few channels than the calls cost.
        """
        taps = math.prod(self.kernel)
        return self.few_channels and taps >= LARGE_KERNEL and taps * self.i * self.positions >= MANY_UNFOLDED

    @property
    def unfolds_all(self) -> bool:
        """Whether "shifted" makes one product of patches that are unfolded along all axes, not one for each row of the kernel.

        The rows of the smaller products would fill no vector register. With groups, the larger copy costs more than it gains.
        On an accelerator each product costs a start.
        """
        return not self.profile.has_caches or (self.k == 1 and self.i * math.prod(self.kernel[1:]) < FILLED)

    @property
    def limit(self) -> int:
        """The bytes of temporaries for a single sample up to which a form is offered."""
        return LIMIT if self.budget == BUDGET else self.budget

    def floats(self, form: str) -> float:
        """How many temporary numbers ``form`` needs for one sample."""
        pixels, taps = self.r * math.prod(self.map), math.prod(self.kernel)
        match form:
            case "direct":
                return self.k * (self.i * pixels + self.o * self.positions + 2 * self.i * self.o * taps)
            case "shifted":
                if self.unfolds_all:
                    return self.k * self.i * taps * (self.positions + self.o)
                rows = self.r * self.padded[0] * math.prod(self.out[1:])
                return self.k * math.prod(self.kernel[1:]) * self.i * (rows + self.o)
            case "gram":
                return self.k * (3 * (self.r * math.prod(self.padded)) ** 2 + 2 * self.positions**2)
            case _:
                return self.k * self.positions * (self.i * taps + 2 * self.positions)

    def step(self, form: str) -> int:
        """How many samples ``form`` takes at a time."""
        # A call for depthwise gradients does much work that does not depend on the samples, so fewer calls are better.
        budget = self.limit if form == "direct" and self.depthwise else self.budget
        most = max(1, min(self.n, int(budget // (self.floats(form) * self.itemsize))))
        # All parts have about the same size, since a call for a few remaining samples would cost nearly as much as a full one.
        return -(-self.n // -(-self.n // most))


def counts(form: str, at: Sizes) -> Counts:
    """How much of each kind of work ``form`` does.

    The kinds are blocks of samples, calls of torch, matrix products and their multiplications (rounded up to vector registers),
    elements that are read, written or copied, and the runs of adjacent elements in which these lie.
    """
    blocks, taps, steps = -(-at.n // at.step(form)), math.prod(at.kernel), sum(size - 1 for size in at.kernel)
    pixels, positions, pairs = at.r * math.prod(at.map), at.positions, at.n * at.k
    work: Counts
    match form:
        case "direct":
            work = {"blocks": blocks, "calls": blocks, "outputs": pairs * at.i * at.o * taps, "groups": pairs}
            work["factors"] = pairs * (at.i * pixels + at.o * positions)
            if at.depthwise:
                return {**work, "depthwise": pairs * taps * positions}
            work["in turn"] = at.n
            unfolded = pairs * taps * positions * at.i
            in_patches = {"unfolded": unfolded, "runs": unfolded / at.out[-1]}
            if at.few_channels and (at.one_by_one or blocks == at.n):
                return {"alone": at.n, "multiply": unfolded * _up(at.o, 8)}
            if at.o < 8:  # torch has no code for so few channels, and unfolds patches group by group
                return {**work, **in_patches, "loops": pairs}
            if at.few_channels:
                return {**work, **in_patches, "multiply": unfolded * _up(at.o, 8)}
            return {**work, "multiply": pairs * taps * positions * _up(at.i, 8) * _up(at.o, 8)}
        case "shifted":
            calls = 1 if at.unfolds_all else at.kernel[0]
            row, products = at.i * (taps if at.unfolds_all else math.prod(at.kernel[1:])), pairs * calls
            copied = 0 if taps == 1 and max(at.stride) == 1 and not any(at.padding) else at.n * at.floats(form)
            return {
                "blocks": blocks,
                # A CPU's price of a call was fitted with two more of them everywhere.
                "calls": blocks * (calls + (2 if copied or at.profile.has_caches else 0)),
                "products": products,
                "multiply": products * positions * _up(row, 8) * (_up(at.o, 16) if at.o > 1 else 1),
                "packed": products * positions * (row + at.o),
                "outputs": products * row * at.o,
                "copied": copied,
                "runs": copied / at.out[-1],
            }
        case "gram":
            padding = pixels**2 / at.map[-1] if any(at.padding) else 0
            return {
                "blocks": blocks,
                "calls": blocks * (4 + steps),
                "products": 2 * pairs,
                "multiply": pairs * (pixels**2 * at.i + positions**2 * at.o),
                "added": pairs * (at.r * math.prod(at.padded)) ** 2 * (1 + steps),
                "runs": pairs * (positions**2 / at.out[-1] + padding),
                "packed": pairs * (pixels * at.i + positions * at.o + positions**2),
            }
        case _:
            copied = pairs * positions * at.i * taps if taps > 1 else 0
            work = {"blocks": blocks, "calls": 4 * blocks, "copied": copied, "runs": copied / at.kernel[-1]}
            work["packed"] = pairs * positions * (at.i * taps + at.o + positions)
            if positions == 1:  # A norm is a product of norms then.
                return work
            return {**work, "products": 2 * pairs, "multiply": pairs * positions**2 * (at.i * taps + at.o)}


@lru_cache(4096)
def predicted(at: Sizes) -> dict[str, float]:
    """Milliseconds of each form that fits into memory."""
    forms = [form for form in FORMS if form == "direct" or at.floats(form) * at.itemsize <= at.limit]
    overlapping = any(size > step for size, step in zip(at.kernel, at.stride, strict=True))
    if at.positions > 1 and (overlapping or max(at.kernel) == 1):  # The pixels' Gram matrix is no slower.
        forms = [form for form in forms if form != "patches"]
    prices = NANOSECONDS if at.profile.has_caches else OF_ACCELERATORS
    return {
        form: sum(prices[form].get(kind, 0) * size for kind, size in counts(form, at).items()) / 1e6 for form in forms
    }


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
