"""Ways to squared norms of per-sample gradients, written by hand and without any check, of which the fastest is found by trying.

The ways of convolutions are the library's own functions, of which each is called directly.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_secorder.per_sample import Convolution
from torch_secorder.per_sample.convolution_gram import gram_norms
from torch_secorder.per_sample.convolution_products import one_product, shifted_products

Ways = dict[str, Callable[[], Tensor]]
ATTEMPTS = 3  # timings of each way, of which the shortest counts
STRIP = 32  # columns of a Gram matrix that are computed at once
CACHED = 2**21  # numbers of temporaries that stay in the caches
LARGE = 2**16  # numbers from which on a norm, which writes nothing beside its result, is faster than a product


class Fastest:
    """Takes the fastest of several ways to the same number; the first call for a key finds out which one that is."""

    def __init__(self) -> None:
        self.names: dict[Any, str] = {}

    def __call__(self, key: Any, ways: Ways) -> Tensor:
        if key not in self.names:
            times = {name: min(map(seconds, [way] * ATTEMPTS)) for name, way in ways.items()}
            self.names[key] = min(times, key=lambda name: times[name])
        return ways[self.names[key]]()


def seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def squared(rows: Tensor) -> Tensor:
    """``||row||^2`` over the last axis."""
    return torch.linalg.vecdot(rows, rows) if rows.numel() <= LARGE else torch.linalg.vector_norm(rows, dim=-1).square()


def in_parts(way: Callable[..., Tensor], size: int, *factors: Tensor) -> Tensor:
    """A way's result for as many samples at a time as their temporaries of ``size`` numbers each stay in the caches."""
    step, n = max(1, CACHED // size), len(factors[0])
    if step >= n:
        return way(*factors)
    return torch.cat([way(*(x[start : start + step] for x in factors)) for start in range(0, n, step)])


# Matrices: ||sum_t g_t a_t^T||^2 of factors [n, t, features]


def of_matrices(a: Tensor, g: Tensor) -> Ways:
    t, i, o = a.shape[1], a.shape[2], g.shape[2]
    return {
        "whole": partial(in_parts, whole, 2 * t * t, a, g),
        "strips": partial(in_parts, strips, 2 * t * STRIP, a, g),
        "formed": partial(in_parts, formed, i * o, a, g),
    }


def whole(a: Tensor, g: Tensor) -> Tensor:
    """``sum_{t,s} (a_t . a_s)(g_t . g_s)``."""
    return (a @ a.mT).mul_(g @ g.mT).sum((1, 2))


def strips(a: Tensor, g: Tensor) -> Tensor:
    """The same from the lower halves of the matrices."""
    found = []
    for start in range(0, a.shape[1], STRIP):
        columns = slice(start, start + STRIP)
        both = (a[:, start:] @ a[:, columns].mT).mul_(g[:, start:] @ g[:, columns].mT)
        found += [both.sum((1, 2)), both[:, STRIP:].sum((1, 2))]
    return torch.stack(found).sum(0)


def formed(a: Tensor, g: Tensor) -> Tensor:
    """The same from the gradients themselves."""
    return squared((g.mT @ a).flatten(1))


# Convolutions


def of_convolution(form: Convolution) -> Ways:
    forms = {"direct": direct, "shifted": shifted, "gram": lambda part: gram_norms(part)[0]}
    fitting = {name for name in forms if form.sizes.floats(name) * 4 <= form.sizes.limit} | {"direct"}
    return {name: partial(in_steps, forms[name], form, form.sizes.step(name)) for name in fitting}


def in_steps(way: Callable[[Convolution], Tensor], form: Convolution, step: int) -> Tensor:
    if step >= form.n:
        return way(form)
    return torch.cat([way(form.select(slice(start, start + step))) for start in range(0, form.n, step)])


def direct(form: Convolution) -> Tensor:
    return squared(form.dense().flatten(1))


def shifted(form: Convolution) -> Tensor:
    values = [one_product(form)] if form.sizes.unfolds_all else shifted_products(form)
    found = [squared((x if x.is_contiguous() else x.mT).reshape(form.n, -1)) for x in values]
    return torch.stack(found).sum(0)


# Norms: sum_t g_t normalized(x)_t


def of_channels(g: Tensor, x: Tensor, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Those of a batch norm's weight and bias, ``[n, channels]``, by torch's own gradient, for which samples are channels too."""
    n, channels = g.shape[:2]
    g, x = (value.reshape(1, n * channels, -1) for value in (g, x))
    mean, variance = (value.expand(n, -1).flatten() for value in (mean, variance))
    own = torch.ops.aten.native_batch_norm_backward
    _, weight, bias = own(g, x, None, mean, variance, None, None, False, eps, [False, True, True])
    return weight.view(n, channels), bias.view(n, channels)


def of_features(g: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> Ways:
    """Those of a layer norm's weight and bias, both in a row, ``[n, 2 features]``."""
    return {"products": partial(by_products, g, x, mean, scale), "rows": partial(by_rows, g, x, mean, scale)}


def by_products(g: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    return torch.cat([(x - mean).mul_(scale).mul_(g).sum(1), g.sum(1)], 1)


def by_rows(g: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """By torch's own gradient, which reads both once, for one sample at a time."""
    own, like, shape, wanted = torch.ops.aten.native_layer_norm_backward, x[0, 0], x.shape[2:], [False, True, True]
    rows = zip(g, x, mean, scale, strict=True)
    return torch.stack([torch.cat(own(a, b, shape, m, s, like, like, wanted)[1:]) for a, b, m, s in rows])
