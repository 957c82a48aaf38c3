"""The exact numbers, from a float64 loop over samples, and what a variant's numbers are beside them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from benchmarks.steps import Step
from benchmarks.variants import TOTAL, Variant
from benchmarks.workloads import WORKLOADS, Setting
from oracles import double, double_copy, per_sample_losses

T = TypeVar("T")
ROOM = 10  # GiB
RTOL, ATOL = 1e-4, 1e-12  # what DESIGN calls equal in float32


@functools.cache
def exact(workload: str, n: int | None = None) -> dict[str, float]:
    """1/N sum_n ||g_n||^2 of every parameter over the first n samples; no two samples' gradients are held at once."""
    setting = WORKLOADS[workload].setting()
    twin, parameters = double_copy(setting.model)
    inputs, targets = setting.batch(n)
    sums = dict.fromkeys(parameters, 0.0)
    for loss in per_sample_losses(twin, setting.loss_fn, double(inputs), targets):
        for name, g in zip(sums, torch.autograd.grad(loss(), list(parameters.values())), strict=True):
            sums[name] += float(torch.linalg.vector_norm(g)) ** 2
    return {name: value / len(inputs) for name, value in sums.items()}


def verdict(found: Mapping[str, float], expected: Mapping[str, float], rtol: float = RTOL) -> str:
    """Says "exact", or how many parameters there are and how far the numbers are off: their sum, and the worst one."""
    total = sum(expected.values())
    if TOTAL in found:
        off = found[TOTAL] / total - 1
        return "exact" if abs(off) <= rtol else f"wrong, {distance(off)}"
    parts = [] if len(found) == len(expected) else [f"{len(found)} of {len(expected)} parameters"]
    errors = {
        name: value / expected[name] - 1
        for name, value in found.items()
        if not abs(value - expected[name]) <= rtol * expected[name] + ATOL * total
    }
    if errors:
        off = sum(found.values()) / sum(expected[name] for name in found) - 1
        worst = max(errors, key=lambda name: abs(errors[name]))
        parts.append(f"wrong, {distance(off)} ({worst} {distance(errors[worst])})")
    return ", ".join(parts) or "exact"


def distance(off: float) -> str:
    """A relative error, or the factor where it is a large one."""
    return f"x {1 + off:.3g}" if off > 1 else f"{100 * off:+.2g} %"


def refused(action: Callable[[], T]) -> tuple[T | None, str]:
    """What `action` returns, or the beginning of why it doesn't."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return action(), ""
    except Exception as error:
        line = " ".join((str(error).strip().splitlines() or [""])[0].split())
        line = f"{type(error).__name__}: {line}"
        return None, "refuses: " + (line if len(line) <= 90 else f"{line[:87]}...")


def checked(variant: Variant, workload: str, setting: Setting, n: int | None = None) -> tuple[str, Step | None]:
    """The verdict on a variant, and its step where it has one."""
    inputs, targets = setting.batch(n)
    size = sum(p.numel() for p in setting.model.parameters()) * len(inputs) * 4 / 2**30
    if variant.stores and size > ROOM:
        return f"not run: the gradients of all samples take {size:.0f} GiB", None

    def attempt() -> tuple[dict[str, float], Step]:
        step = variant.prepare(setting.model, setting.loss_fn)
        return variant.read(step(inputs, targets)), step

    found, refusal = refused(attempt)
    if found is None:
        return refusal, None
    values, step = found
    if not values:  # it is there for its time
        return "", step
    told = verdict(values, exact(workload, n))
    if variant.estimates:
        told = told.replace("wrong", "estimate")
    elif "wrong" in told and exact_in_float64(variant, workload):
        told = told.replace("wrong", "exact but for rounding")
    return told, step


def exact_in_float64(variant: Variant, workload: str, n: int = 4) -> bool:
    """Whether float32 is all that is wrong with a number: the first samples in float64 tell."""
    setting = WORKLOADS[workload].setting()
    inputs, targets = (double(x) for x in setting.batch(n))
    step = variant.prepare(setting.model.double(), setting.loss_fn)
    found, _ = refused(lambda: variant.read(step(inputs, targets)))
    return found is not None and "wrong" not in verdict(found, exact(workload, n), 1e-8)
