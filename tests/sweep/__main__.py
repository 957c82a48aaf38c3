"""Runs the sweep: `python -m sweep [SOURCE ...] [--only NAME ...] [--again OUTCOME ...] [--publish | --cost]`.

Each architecture runs in a process of its own, two at a time, forked from one in which the libraries are imported.
Outcomes are appended to results.jsonl as they come, and what is there is not run again unless it is asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from .results import RESULTS, Key, appended, last_rows

SECONDS, BYTES = 240, 6 * 2**30  # that each process may take


def child(source: str, name: str, path: Path, paths: list[str] | None) -> None:
    """What runs in an architecture's own process: its row is written to `path`; with `paths` of outputs, its cost."""
    from .cost import cost
    from .judging import outcome
    from .making import NotMadeError, first_line
    from .sources import SOURCES

    begun = time.monotonic()
    row: dict[str, Any] = {"source": source, "name": name}
    torch.manual_seed(0)
    try:
        made = SOURCES[source][1](name)
        row |= outcome(made) if paths is None else cost(made, paths)
    except NotMadeError as error:
        row |= {"outcome": "not made", "reason": str(error)}
    except BaseException as error:
        row |= {"outcome": "not made", "reason": f"in the sweep itself: {first_line(error)}"}
    row["seconds"] = round(time.monotonic() - begun, 1)
    path.write_text(json.dumps(row))


class Pool:
    """Processes of single architectures, of which each has a deadline."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.running: dict[int, tuple[Key, Path, float]] = {}

    def start(self, source: str, name: str, paths: list[str] | None = None) -> None:
        path = self.out.with_suffix(f".{source}.{name}.part")
        if pid := os.fork():
            self.running[pid] = ((source, name), path, time.monotonic() + SECONDS)
            return
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        child(source, name, path, paths)
        os._exit(0)

    def wait(self) -> None:
        """Until one of the processes has ended, or was ended because its time is over."""
        while True:
            for pid, (key, path, deadline) in self.running.items():
                ended, status = os.waitpid(pid, os.WNOHANG)
                if not ended and time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    status = -1
                if ended or status:
                    del self.running[pid]
                    self.keep(key, path, status)
                    return
            time.sleep(0.05)

    def keep(self, key: Key, path: Path, status: int) -> None:
        why = f"not done in {SECONDS} seconds" if status == -1 else f"its process ended with status {status}"
        row = {"source": key[0], "name": key[1], "outcome": "not made", "reason": why}
        if path.exists():
            row = json.loads(path.read_text())
            path.unlink()
        appended(self.out, row)
        print(f"{' '.join(key)}: {row['outcome']} {row.get('reason', '')}"[:150], flush=True)


def options() -> argparse.Namespace:
    from .sources import SOURCES

    parser = argparse.ArgumentParser(prog="sweep")
    parser.add_argument("sources", nargs="*", default=[*SOURCES])
    parser.add_argument("--only", nargs="+", default=[], help="names of architectures")
    parser.add_argument("--again", nargs="+", default=[], help="outcomes that are run again")
    parser.add_argument("--results", type=Path, help="the file of rows, another than the one that is kept")
    parser.add_argument("--at-once", type=int, default=2, help="how many processes")
    parser.add_argument("--cost", action="store_true", help="time those that are exact, instead of judging all")
    parser.add_argument("--publish", action="store_true", help="put the names into the results, and run nothing")
    return parser.parse_args()


def main() -> None:
    from .cost import COSTS, exact_ones
    from .sources import SOURCES

    chosen = options()
    path = chosen.results or (COSTS if chosen.cost else RESULTS)
    known, pool, timed = last_rows(path), Pool(path), exact_ones() if chosen.cost else None
    for source in chosen.sources:
        for name in SOURCES[source][0]():
            if timed is not None and (source, name) not in timed:
                continue
            outcome = known.get((source, name), {"outcome": "not run"})["outcome"]
            if chosen.publish:
                if (source, name) not in known:
                    appended(path, {"source": source, "name": name, "outcome": outcome})
            elif name in chosen.only if chosen.only else outcome in ("not run", *chosen.again):
                if len(pool.running) == chosen.at_once:
                    pool.wait()
                pool.start(source, name, timed and timed[source, name])
    while pool.running:
        pool.wait()


if __name__ == "__main__":
    import transformers  # noqa: F401  (once, in the process from which all others are forked)

    from . import judging  # noqa: F401

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.exit(main())
