"""How time and memory grow with batch, positions, width, depth and vocabulary: `python -m benchmarks.growth`.

A GPT-2-like model of two layers, one of its sizes varied at a time; and how the exact and the sampled Fisher of a classifier
grow with classes, seeds and batches. Times are processor time, of which a loaded machine takes little away. Slopes are those
of least squares between logarithms, over the larger half of the sizes, where fixed costs matter little: 1 is in proportion, 2
is as the square.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.memory import growth, in_a_process
from benchmarks.results import save
from benchmarks.variants import VARIANTS
from benchmarks.workloads import Setting, gpt2
from torch_secorder import fisher_report

BASE = {"n": 4, "positions": 64, "width": 128, "words": 1000, "layers": 2}
AXES: dict[str, tuple[str, list[int], dict[str, int]]] = {
    "batch": ("n", [4, 8, 16, 32, 64, 128], {}),
    "positions": ("positions", [64, 128, 256, 512, 1024, 2048, 4096], {"n": 2}),
    "width": ("width", [64, 128, 256, 512, 1024, 2048], {}),
    "depth": ("layers", [1, 2, 4, 8, 16, 32], {"width": 64, "positions": 32}),
    "vocabulary": ("words", [1000, 3000, 10_000, 30_000, 100_000], {}),
}
# Of a classifier with C outputs: sizes, and how C, the seeds (None for the exact Fisher) and the batches come from them.
FISHER: dict[str, tuple[list[int], Callable[[int], tuple[int, int | None, int]]]] = {
    "classes": ([10, 20, 40, 80, 160, 320], lambda size: (size, None, 1)),
    "seeds": ([8, 16, 32, 64, 128, 256], lambda size: (1000, size, 1)),
    "batches": ([4, 8, 16, 32, 64], lambda size: (20, None, size)),
}
NAMES = ("plain", "monitor", "monitor_loop", "functional")


def setting(axis: str, size: int) -> Setting:
    argument, _, others = AXES[axis]
    torch.manual_seed(0)
    return gpt2(**{**BASE, **others, argument: size})


def memory(axis: str, size: int, variant: str) -> dict[str, Any]:
    return growth(setting(axis, size), variant)


def seconds(model: Setting, names: Sequence[str], repeats: int) -> dict[str, float]:
    """The median of several interleaved runs of each variant."""
    steps = {name: VARIANTS[name].prepare(model.model, model.loss_fn) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            model.model.zero_grad(set_to_none=True)
            start = time.process_time()
            step(*model.batch())
            times[name].append(time.process_time() - start)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def fisher_seconds(axis: str, size: int, repeats: int) -> float:
    """The median of several runs over all batches."""
    classes, seeds, batches = FISHER[axis][1](size)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, classes))
    data = [(torch.randn(32, 64), None) for _ in range(batches)]
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        kind = {"fisher": "exact"} if seeds is None else {"fisher": "sampled", "num_samples": seeds}
        fisher_report(model, None, data, progress=False, verify=False, **kind)
        times.append(time.process_time() - start)
    return statistics.median(times[1:])


def fisher_measured(axis: str, repeats: int, most: int | None) -> dict[str, dict[str, Any]]:
    """Sizes, milliseconds and their slope."""
    sizes = [size for size in FISHER[axis][0] if most is None or size <= most]
    milliseconds = [1000 * fisher_seconds(axis, size, repeats) for size in sizes]
    slopes = {"milliseconds": slope(sizes, milliseconds)}
    return {"fisher_report": {"sizes": sizes, "milliseconds": milliseconds, "slopes": slopes}}


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Of the line through the larger half of the points, on logarithmic axes."""
    half = len(sizes) // 2
    x = torch.tensor(sizes[half:], dtype=torch.float64).log()
    y = torch.tensor(values[half:], dtype=torch.float64).log()
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())


def measured(axis: str, names: Sequence[str], repeats: int, most: int | None) -> dict[str, dict[str, Any]]:
    """By variant: sizes, milliseconds, MiB, and the slopes of both."""
    sizes = [size for size in AXES[axis][1] if most is None or size <= most]
    rows: dict[str, dict[str, Any]] = {name: {"sizes": sizes, "milliseconds": [], "mib": []} for name in names}
    for size in sizes:
        print(f"{axis} {size:,}", file=sys.stderr)
        for name, value in seconds(setting(axis, size), names, repeats).items():
            rows[name]["milliseconds"].append(1000 * value)
            rows[name]["mib"].append(in_a_process(memory, axis, size, name)["mib"])
    for row in rows.values():
        row["slopes"] = {kind: slope(sizes, row[kind]) for kind in ("milliseconds", "mib")}
    return rows


def printed(axis: str, rows: dict[str, dict[str, Any]]) -> None:
    print(f"\n{axis:24}" + "".join(f"{size:>10,}" for size in rows["plain"]["sizes"]) + "     slope")
    for kind, unit in (("milliseconds", "ms"), ("mib", "MiB")):
        for name, row in rows.items():
            cells = "".join(f"{value:10.1f}" for value in row[kind])
            print(f"{VARIANTS[name].label:24}{cells}{row['slopes'][kind]:10.2f}  {unit}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.growth", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--axes", nargs="+", choices=[*AXES, *FISHER], default=[*AXES, *FISHER])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(NAMES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--most", type=int, help="no size beyond this")
    parser.add_argument("--save", action="store_true", help="write the results for the page")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for axis in options.axes:
        if axis in FISHER:
            rows = fisher_measured(axis, options.repeats, options.most)
            print(axis, rows["fisher_report"], flush=True)
        else:
            rows = measured(axis, list(dict.fromkeys(["plain", *options.variants])), options.repeats, options.most)
            printed(axis, rows)
        if options.save:
            save("growth", {axis: rows})


if __name__ == "__main__":
    main()
