"""How well the cost model of convolutions predicts, form by form: ``python tests/benchmarks/convolution_cost.py [--fit]``.

Times are those of one thread, the shortest of several interleaved runs (other work on the machine only ever adds), beside
the layer's own weight gradient. ``--fit`` prints the constants that the measured times ask for. On another device
(``--device cuda``) every form that takes less than a fifth of a second is run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from itertools import product
from math import inf
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import least_squares

from torch_secorder.per_sample import Convolution
from torch_secorder.per_sample.costs import FORMS, NANOSECONDS, OF_ACCELERATORS, counts, predicted

# Forms that should take longer than this, and than the cheapest by this factor, are not run.
MOST_MS, MOST_TIMES = 30.0, 12.0
# What takes longer than this is timed once.
SLOW_MS = 200.0


class Case(NamedTuple):
    """A square convolution, with "same" padding if nothing else is said."""

    n: int
    channels: int
    out: int
    map: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    padding: int | None = None

    def form(self, device: str = "cpu") -> Convolution:
        padding = [self.kernel // 2 if self.padding is None else self.padding] * 2
        stride = [self.stride] * 2
        after = (self.map + 2 * padding[0] - self.kernel) // self.stride + 1
        x = torch.randn(self.n, 1, self.channels, self.map, self.map, device=device)
        g = torch.randn(self.n, 1, self.out, after, after, device=device)
        shape = (self.out, self.channels // self.groups, self.kernel, self.kernel)
        return Convolution(x, g, shape, stride, padding, [1, 1], self.groups)


# The table of forms that this work started from.
REFERENCE = [
    Case(128, 32, 64, 16),
    Case(128, 64, 128, 8),
    Case(32, 64, 64, 16),
    Case(32, 128, 128, 8),
    Case(32, 256, 256, 4),
    Case(32, 512, 512, 2),
    Case(32, 3, 64, 64, 7, 2),
]


def grid() -> Iterator[Case]:
    """Layers as networks have them: wide where maps are small."""
    yield from REFERENCE
    layers = [
        *((3, 32, 32), (3, 16, 64), (16, 16, 32), (32, 32, 32), (32, 64, 16), (64, 64, 32), (64, 128, 16), (64, 64, 8)),
        *((128, 128, 16), (128, 128, 8), (128, 256, 4), (256, 256, 8), (256, 256, 4), (512, 512, 4), (256, 512, 2)),
    ]
    for n, (channels, out, size), (kernel, stride) in product(
        (8, 32), layers, ((1, 1), (3, 1), (3, 2), (5, 1), (1, 2))
    ):
        yield Case(n, channels, out, size, kernel, stride)
    yield from (
        Case(128, *sizes) for sizes in ((3, 32, 32), (32, 64, 16), (16, 16, 16), (64, 128, 8, 3, 2), (64, 64, 4))
    )
    for n, (channels, size), (kernel, stride) in product(
        (8, 32), ((32, 32), (64, 16), (128, 8), (256, 4), (512, 2)), ((3, 1), (3, 2), (5, 1), (7, 1))
    ):
        yield Case(n, channels, channels, size, kernel, stride, groups=channels)
    patches = ((3, 192, 64, 16), (3, 384, 96, 16), (3, 96, 64, 4), (96, 192, 16, 2), (64, 64, 8, 8), (64, 256, 4, 4))
    for n, (channels, out, size, kernel) in product((8, 32), patches):
        yield Case(n, channels, out, size, kernel, stride=kernel, padding=0)
    yield from (Case(32, 64, 3, 32), Case(32, 32, 1, 32), Case(32, 16, 4, 16), Case(32, 4, 4, 16), Case(8, 64, 64, 56))
    for groups, (channels, size) in product((2, 8, 32), ((64, 16), (128, 8), (256, 4))):
        yield Case(32, channels, channels, size, groups=groups)


def layer_gradient(form: Convolution) -> torch.Tensor:
    """What the layer's backward pass computes."""
    x, g, settings = form.x[:, 0], form.g[:, 0], (form.stride, form.padding, form.dilation)
    weight = x.new_empty(form.shape)
    return torch.ops.aten.convolution_backward(
        g, x, weight, None, *settings, False, [0, 0], form.groups, [False, True, False]
    )[1]


def milliseconds(forms: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """The shortest time of each: of the processor, or with an accelerator until that is done."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repetitions + 1):
        for name, run in forms.items():
            if len(times[name]) > 1 and times[name][-1] > SLOW_MS:
                continue
            start = clock()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(1e3 * (clock() - start))
    return {name: min(values[1:]) for name, values in times.items()}


def measured(case: Case, repetitions: int, thorough: bool, device: str = "cpu") -> dict[str, float]:
    """Milliseconds of the layer's own gradient and of each form that is worth a try."""
    form = case.form(device)
    costs = predicted(form.sizes)
    most = inf if device != "cpu" else max(MOST_MS if thorough else 0.0, MOST_TIMES * min(costs.values()))
    ways: dict[str, Callable[[], object]] = {"layer": lambda: layer_gradient(form)}
    ways |= {way: lambda way=way: form.squared_norms(way) for way, cost in costs.items() if cost <= most}
    return milliseconds(ways, repetitions)


def fit(times: dict[Case, dict[str, float]], device: str) -> None:
    """Constants with the smallest errors of the logarithm, form by form, and robust against single bad times."""
    for form in FORMS:
        prices = (NANOSECONDS if device == "cpu" else OF_ACCELERATORS)[form]
        seen = [(counts(form, case.form(device).sizes), row[form]) for case, row in times.items() if form in row]
        kinds, start = list(prices), np.log(list(prices.values()))
        work = np.array([[count.get(kind, 0) / (1e6 * ms) for kind in kinds] for count, ms in seen])

        def errors(logarithms: np.ndarray, work: np.ndarray = work, start: np.ndarray = start) -> np.ndarray:
            # What the times don't tell stays where it was.
            return np.concatenate([np.log(work @ np.exp(logarithms)), 0.1 * (logarithms - start)])

        constants = np.exp(least_squares(errors, start, loss="soft_l1", f_scale=0.2).x)
        print(
            f'    "{form}": ' + "{" + ", ".join(f'"{k}": {v:.2g}' for k, v in zip(kinds, constants, strict=True)) + "},"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fit", action="store_true", help="run slow forms too, and print constants")
    parser.add_argument("--reference", action="store_true", help="only the first few layers")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--times", type=Path, help="where to keep the times, or to read them from if they are there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'layer':<34}" + "".join(f"{name:>17}" for name in ("layer", *FORMS)) + "  picked    best      ratio")
    times, ratios, errors = {}, [], []
    kept = json.loads(options.times.read_text()) if options.times and options.times.exists() else []
    known = {Case(*case): row for case, row in kept}
    for case in known or (REFERENCE if options.reference else grid()):
        times[case] = row = known.get(case) or measured(case, options.repetitions, options.fit, options.device)
        form = case.form("meta" if known and options.device != "cpu" else options.device)
        costs, picked = predicted(form.sizes), form.algorithm
        best = min((way for way in row if way != "layer"), key=lambda way: row[way])
        ratios.append(row[picked] / row[best])
        errors += [abs(np.log(costs[way] / ms)) for way, ms in row.items() if way != "layer"]
        cells = [f"{row['layer']:17.2f}"]
        cells += [f"{row[way]:8.2f} ({costs[way]:6.2f})" if way in row else f"{'-':>17}" for way in FORMS]
        name = f"{case.n}, {case.channels} to {case.out}, {case.map}², k{case.kernel} s{case.stride} g{case.groups}"
        print(f"{name:<34}" + "".join(cells) + f"  {picked:<9} {best:<9} {ratios[-1]:.2f}", flush=True)
    median, most = np.exp(np.quantile(errors, [0.5, 0.9]))
    print(f"prediction off by a factor of {median:.2f} (median), {most:.2f} (90 %)")
    print(f"picked over best: mean {np.mean(ratios):.3f}, 99 % {np.quantile(ratios, 0.99):.2f}, most {max(ratios):.2f}")
    if options.times and not known:
        options.times.write_text(json.dumps([[case, row] for case, row in times.items()]))
    if options.fit:
        fit(times, "meta" if known and options.device != "cpu" else options.device)


if __name__ == "__main__":
    main()
