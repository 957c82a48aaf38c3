"""Peak memory of a step with the numbers, over that of a plain one: `python -m benchmarks.memory`.

Each variant runs in a process of its own. Counted is the most that the process holds during three steps above what it holds
before them, with the model and the batch loaded and a first step taken on two samples. That has the heap's holes in it, which
differ by a fifth from one run to the next; the bytes of all tensors that are alive at once are counted besides, and do not.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import re
import resource
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from benchmarks.exactness import ROOM, refused
from benchmarks.live_bytes import LiveBytes
from benchmarks.results import save
from benchmarks.steps import Step
from benchmarks.variants import VARIANTS
from benchmarks.workloads import WORKLOADS, Setting, Workload

MIB = 2**20
STEPS = 3  # the first looks for the samples, and where the heap's holes are shows in later ones
FORKS = multiprocessing.get_context(
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)
FORKS.set_forkserver_preload(
    ["benchmarks.exactness", "transformers.models.gpt2.modeling_gpt2", "transformers.models.bert.modeling_bert"]
)


class Peak:
    """``with Peak() as peak:`` tells in ``peak.bytes`` how far the process grew inside, at most."""

    def __enter__(self) -> Peak:
        gc.collect()
        trim()
        self._resets = reset()
        self._before = status("VmRSS") if self._resets else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return self

    def __exit__(self, *exc_info: object) -> None:
        peak = status("VmHWM") if self._resets else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.bytes = peak - self._before


def trim() -> None:
    """Have glibc give back what is free."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        return


def reset() -> bool:
    """Forget the peak so far, where the system can; else only what exceeds it will be seen."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def peak(setting: Setting, variant: str) -> tuple[int | None, str]:
    """Bytes that steps of the variant need, in this process, which should be a fresh one."""
    step, refusal = refused(lambda: warm(setting, variant))
    if step is None:
        return None, refusal
    with Peak() as found:
        for _ in range(STEPS):
            result, refusal = refused(lambda: (step(*setting.batch()),))
            del result
            setting.model.zero_grad(set_to_none=True)
    return (None, refusal) if refusal else (found.bytes, "")


def live_peak(setting: Setting, variant: str) -> tuple[int | None, str]:
    """Bytes of tensors that are alive at once in steps of the variant."""
    step, refusal = refused(lambda: warm(setting, variant))
    peaks = [0]
    for _ in range(0 if step is None else STEPS):
        with LiveBytes() as live:
            result, refusal = refused(lambda: (step(*setting.batch()),))
            del result
        peaks.append(live.peak)
        setting.model.zero_grad(set_to_none=True)
    return (None, refusal) if refusal else (max(peaks), "")


def warm(setting: Setting, variant: str) -> Step:
    """The step, its code loaded, with nothing left of what it did on two samples."""
    step = VARIANTS[variant].prepare(setting.model, setting.loss_fn)
    step(*(x.clone() for x in setting.batch(2)))
    setting.model.zero_grad(set_to_none=True)
    return step


def in_a_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What `function` returns in a fresh process, or that it came to grief.

    Processes are forks of one that has imported everything and done nothing yet.
    """
    with ProcessPoolExecutor(1, mp_context=FORKS) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            return {"verdict": "the process was killed"}


def growth(
    setting: Setting, variant: str, measure: Callable[[Setting, str], tuple[int | None, str]] = peak
) -> dict[str, Any]:
    """How far the process grows, or what else is measured, in MiB, or why that is not known."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    size = sum(p.numel() for p in setting.model.parameters()) * len(setting.inputs) * 4 / 2**30
    if VARIANTS[variant].stores and size > ROOM:
        return {"verdict": f"not run: the gradients of all samples take {size:.0f} GiB"}
    found, refusal = measure(setting, variant)
    return {"verdict": refusal} if found is None else {"mib": found / MIB}


def of_workload(workload: str, variant: str) -> dict[str, Any]:
    return growth(WORKLOADS[workload].setting(), variant)


def tensors_of_workload(workload: str, variant: str) -> dict[str, Any]:
    return growth(WORKLOADS[workload].setting(), variant, live_peak)


def ratios_of_tensors(workload: str, names: Sequence[str]) -> dict[str, float]:
    """By variant: the bytes of tensors that are alive at once, over those of the plain step. They are the same in every run."""
    rows = {name: in_a_process(tensors_of_workload, workload, name) for name in dict.fromkeys(["plain", *names])}
    return {name: row["mib"] / rows["plain"]["mib"] for name, row in rows.items() if "mib" in row}


def measured(workload: str, names: Sequence[str], repeats: int) -> dict[str, dict[str, Any]]:
    """By variant: the median peak of several processes, its ratio to the plain step's, and the tensors' ratio."""
    rows: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(["plain", *names]):
        found = [in_a_process(of_workload, workload, name)]
        while "mib" in found[0] and len(found) < repeats:
            found.append(in_a_process(of_workload, workload, name))
        rows[name] = sorted(found, key=lambda row: row.get("mib", 0.0))[len(found) // 2]
        if "mib" in rows[name]:
            rows[name]["ratio"] = rows[name]["mib"] / rows["plain"]["mib"]
    for name, ratio in ratios_of_tensors(workload, [name for name in names if "mib" in rows[name]]).items():
        rows[name]["tensors"] = ratio
    return rows


def printed(workload: Workload, rows: dict[str, dict[str, Any]]) -> None:
    plain = f"plain step {rows['plain']['mib']:.1f} MiB"
    print(f"\n{workload.label}\n  {plain:26}  process  tensors")
    for name, row in list(rows.items())[1:]:
        ratios = "".join(f"{row[kind]:9.2f}" if kind in row else "        -" for kind in ("ratio", "tensors"))
        told = workload.goals.told(name, row.get("tensors"), memory=True)
        print(f"  {VARIANTS[name].label:26}{ratios}   {told:18}{row.get('verdict', '')}".rstrip(), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.memory", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--repeats", type=int, default=3, help="processes for each variant (%(default)s)")
    parser.add_argument("--save", action="store_true", help="write the results for the page")
    options = parser.parse_args(arguments)
    for name in options.workloads:
        rows = measured(name, options.variants, options.repeats)
        printed(WORKLOADS[name], rows)
        if options.save:
            save("memory", {name: rows})


if __name__ == "__main__":
    main()
