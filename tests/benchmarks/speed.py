"""Time of a step with the numbers, over that of a plain one: `python -m benchmarks.speed`, with tests on the path.

In one process and one thread, every run of a variant stands between two plain steps, whose mean it is divided by; rounds
go through all variants in turn, and the median over rounds is told. A variant that takes much longer than a plain step
runs in fewer of them.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.exactness import checked, refused
from benchmarks.floors import floor
from benchmarks.results import save
from benchmarks.steps import Step
from benchmarks.variants import BOUNDS, OURS, VARIANTS, Variant
from benchmarks.workloads import WORKLOADS, Workload

SLOW = 4.0  # plain steps
# Calls of ours, of which the 1st, 2nd, 3rd, 5th and 9th check more than later ones, which a long run is made of. The first call
# of a bound tries several ways.
CHECKED = 9


@dataclass
class Contender:
    """A variant that is ready to run.

    Attributes:
        least: the seconds of its fastest step.
    """

    variant: Variant
    model: nn.Module
    step: Step
    verdict: str
    ratios: list[float] = field(default_factory=list)
    least: float = math.inf

    def seconds(self, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
        """Of one step. What it leaves behind is freed outside of the measurement."""
        start = time.process_time()
        result = self.step(*batch)
        elapsed = time.process_time() - start
        self.least = min(self.least, elapsed)
        del result
        self.model.zero_grad(set_to_none=True)
        return elapsed


def contenders(workload: Workload, names: Sequence[str], n: int | None, check: bool) -> Iterator[Contender | str]:
    """Every variant on a copy of the model of its own; or why it doesn't run."""
    setting = workload.setting()
    for name in names:
        twin = copy.deepcopy(setting.model)
        report(f"{workload.name}: {VARIANTS[name].label}")
        if check or VARIANTS[name].stores:
            verdict, step = checked(VARIANTS[name], workload.name, setting.on(twin), n)
        else:
            step, verdict = refused(lambda: VARIANTS[name].prepare(twin, setting.loss_fn))  # noqa: B023
        twin.zero_grad(set_to_none=True)
        yield Contender(VARIANTS[name], twin, step, verdict) if step is not None else verdict


def measured(
    workload: Workload, names: Sequence[str], repeats: int, n: int | None = None, check: bool = True
) -> dict[str, dict[str, Any]]:
    """By variant: its ratio to a plain step, milliseconds, and the verdict on its numbers.

    The ratio is the median over rounds, with its quartiles; beside it stands that of the fastest steps, which other programs on
    the machine change least.
    """
    names = list(dict.fromkeys(["plain", *names]))
    found = dict(zip(names, contenders(workload, names, n, check), strict=True))
    rows = {name: {"verdict": x} for name, x in found.items() if isinstance(x, str)}
    ready = [x for x in found.values() if isinstance(x, Contender)]
    plain, others = ready[0], ready[1:]
    batch = workload.setting().batch(n)
    for other in others:
        for _ in range(CHECKED if other.variant.name in (*OURS, *BOUNDS.values()) else 0):
            other.seconds(batch)
    gc.collect()
    gc.freeze()  # so that a collection is as cheap as in a small program
    steps = []
    before = min(plain.seconds(batch) for _ in range(3))
    for number in range(repeats):
        for other in others:
            report(f"{workload.name}: round {number + 1} of {repeats}, {other.variant.label}")
            if number and number % 5 and median(other.ratios) > SLOW:
                continue
            seconds = other.seconds(batch)
            after = plain.seconds(batch)
            other.ratios.append(2 * seconds / (before + after))
            steps.append(before := after)
    gc.unfreeze()
    report("")
    milliseconds = 1000 * median(steps or [before])
    rows["plain"] = {"milliseconds": milliseconds, "ratio": 1.0}
    for other in others:
        q = torch.tensor(other.ratios).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        rows[other.variant.name] = {
            "ratio": q[1],
            "quartiles": [q[0], q[2]],
            "milliseconds": q[1] * milliseconds,
            "of fastest": other.least / plain.least,
            "verdict": other.verdict,
        }
    return {name: rows[name] for name in names}


def printed(workload: Workload, rows: dict[str, dict[str, Any]]) -> None:
    low = floor(workload.setting())
    print(f"\n{workload.label}")
    print(f"  plain step {rows['plain']['milliseconds']:.1f} ms; ", end="")
    print(f"floor {low.operations:.2f} by operations, {low.bytes:.2f} by bytes")
    for name, row in list(rows.items())[1:]:
        ratio = "      -"
        if "ratio" in row:
            ratio = f"{row['ratio']:7.2f}  [{row['quartiles'][0]:.2f}, {row['quartiles'][1]:.2f}]"
        told = workload.goals.told(name, row.get("ratio"))
        print(f"  {VARIANTS[name].label:26}{ratio:24}{told:18}{row['verdict']}".rstrip(), flush=True)
    rows["plain"]["floor"] = {"operations": low.operations, "bytes": low.bytes}


def report(line: str) -> None:
    """The one line of progress, where somebody looks."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.speed", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--repeats", type=int, default=15, help="rounds (%(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, help="the first so many samples only")
    parser.add_argument("--no-check", action="store_true", help="don't compare with the exact numbers first")
    parser.add_argument("--save", action="store_true", help="write the results for the page")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    for name in options.workloads:
        rows = measured(WORKLOADS[name], options.variants, options.repeats, options.batch, not options.no_check)
        printed(WORKLOADS[name], rows)
        if options.save:
            save("speed", {name: rows})


if __name__ == "__main__":
    main()
