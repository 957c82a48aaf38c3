"""What became slower or larger: `python -m benchmarks.check`, with tests on the path, in about ten minutes.

Ratios to a plain step in the same process are compared with those that were stored for the same kind of machine: of the
fastest steps, which other programs on the machine change least. What seems worse is measured again, twice at most, and its
smallest ratio counts, since a step that does more is slower each time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence

import torch

from benchmarks import memory, results, speed
from benchmarks.variants import BOUNDS, VARIANTS
from benchmarks.workloads import WORKLOADS, Workload

TIMED = ("monitor_loop", "monitor", "functional")
BOUND = " bound"  # after a variant's name, for what the same products cost by hand
SIZED = ("monitor", "functional")
MEMORY = " memory"  # after a variant's name, for the tensors of its steps
WORSE = 1.05
ATTEMPTS = 3
ROUNDS = 11

Ratios = dict[str, dict[str, float]]  # workload -> what was measured -> its ratio to a plain step


def kind() -> str:
    """What ratios are comparable on: the processor, the number of threads and torch's version."""
    return f"{results.processor()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def stored() -> dict[str, Ratios]:
    """Kind of machine -> the ratios that were stored for it."""
    path = results.FOLDER / "check.json"
    return json.loads(path.read_text()) if path.exists() else {}


def store(found: Ratios) -> None:
    """Put these ratios in the place of those that were stored for this kind of machine."""
    every = stored()
    every[kind()] = every.get(kind(), {}) | found
    results.FOLDER.mkdir(exist_ok=True)
    (results.FOLDER / "check.json").write_text(json.dumps(every, indent=1, sort_keys=True) + "\n")


def times(workload: Workload, variants: Sequence[str], rounds: int, n: int | None) -> dict[str, float]:
    """The ratio of each variant's fastest step to the fastest plain one, and that of its bound if it has one."""
    bounds = {name: BOUNDS[name] for name in variants if name in BOUNDS}
    rows = speed.measured(workload, [*variants, *bounds.values()], rounds, n, check=False)
    found = {name: rows[name]["of fastest"] for name in variants}
    return found | {name + BOUND: rows[bound]["of fastest"] for name, bound in bounds.items()}


def sizes(workload: Workload, variants: Sequence[str]) -> dict[str, float]:
    """The ratio of the tensors that are alive at once in each variant's steps to those in a plain step."""
    found = memory.ratios_of_tensors(workload.name, variants)
    return {name + MEMORY: found[name] for name in variants}


def worse(found: dict[str, float], before: dict[str, float]) -> list[str]:
    """What has a ratio that is more than five per cent above the stored one; bounds are for comparison only."""
    ours = {name: ratio for name, ratio in found.items() if not name.endswith(BOUND)}
    return [name for name, ratio in ours.items() if ratio > WORSE * before.get(name, float("inf"))]


def ratios(
    workload: Workload, before: dict[str, float], rounds: int = ROUNDS, n: int | None = None
) -> dict[str, float]:
    """The ratios of one workload; of what seems worse than before the smallest of several measurements."""
    found = {**times(workload, TIMED, rounds, n), **sizes(workload, SIZED)}
    for _ in range(ATTEMPTS - 1):
        again = worse(found, before)
        timed = [name for name in again if not name.endswith(MEMORY)]
        sized = [name.removesuffix(MEMORY) for name in again if name.endswith(MEMORY)]
        more = times(workload, timed, rounds, n) if timed else {}
        more |= sizes(workload, sized) if sized else {}
        found |= {name: min(found[name], ratio) for name, ratio in more.items()}
    return found


def lines(workload: Workload, found: dict[str, float], before: dict[str, float]) -> Iterator[str]:
    """The workload's part of the table."""
    yield workload.label
    slower = worse(found, before)
    for name, ratio in found.items():
        if name.endswith(BOUND):
            continue
        label = VARIANTS[name.removesuffix(MEMORY)].label + (", memory" if name.endswith(MEMORY) else "")
        told = f"stored {before[name]:.2f}" if name in before else "nothing stored"
        bound = f"bound {found[name + BOUND]:.2f}" if name + BOUND in found else ""
        goal = workload.goals.told(name.removesuffix(MEMORY), ratio, memory=name.endswith(MEMORY))
        yield f"  {label:34}{ratio:6.2f}  {told:16}{'WORSE' if name in slower else '':7}{bound:13}{goal}".rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns 1 if something became worse, and 2 if nothing is stored for this kind of machine."""
    parser = argparse.ArgumentParser(prog="benchmarks.check", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds for each ratio (%(default)s)")
    parser.add_argument("--batch", type=int, help="the first so many samples only")
    parser.add_argument("--store", action="store_true", help="put the ratios in the place of the stored ones")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    before = {} if options.store else stored().get(kind(), {})
    print(f"{kind()}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    if not before and not options.store:
        print("nothing is stored for this kind of machine: store the ratios of a commit to compare with, by --store")
        return 2
    found: Ratios = {}
    for name in options.workloads:
        workload, own = WORKLOADS[name], before.get(name, {})
        found[name] = ratios(workload, own, options.rounds, options.batch)
        print(*lines(workload, found[name], own), sep="\n", flush=True)
        if options.store:
            store({name: found[name]})
    slower = [f"{name}: {what}" for name in found for what in worse(found[name], before.get(name, {}))]
    print(f"worse by more than {WORSE - 1:.0%}: {', '.join(slower) or 'nothing'}")
    return int(bool(slower))


if __name__ == "__main__":
    sys.exit(main())
