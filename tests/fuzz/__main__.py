"""The command; `python -m fuzz --help`."""

from __future__ import annotations

import argparse
import collections
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from fuzz.case import Case, drawn
from fuzz.outcomes import FAILURES, Outcome, outcome, shrunk
from fuzz.program import program

ODD = ("data", "dtype", "frozen", "updates", "evaluates", "sequence_first")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fuzz", description="random models and loops against a loop over samples")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1, help="of the run; cases have seeds from SEED * 10**7 on")
    parser.add_argument("--only", default="", help="pieces to choose from, with commas")
    parser.add_argument("--skip", default="", help="pieces to leave out, with commas")
    parser.add_argument("--device", default="cpu", help="where cases run, as the default device")
    parser.add_argument("--case", type=int, help="one case by its seed: made smaller, and printed as a program")
    return parser.parse_args()


def told(case: Case, found: Outcome) -> str:
    """One line for a finding."""
    steps = ", ".join(step.piece + ("+" if step.around else "") for step in case.steps)
    rest = f"{case.stem} > [{steps}] > {case.head}, {case.loss}, n={list(case.sizes)}, t={case.places}, d={case.width}"
    plain = Case(0, 0, 0, "", (), "", "", (), ())
    odd = [f"{name}={getattr(case, name)}" for name in ODD if getattr(case, name) != getattr(plain, name)]
    odd += [f"{name}={value}" for name, value in case.options.items() if value not in (None, False, 1.0, "trainable")]
    return f"case {case.seed} {found.kind} by {'+'.join(case.ways)}: {rest}, {', '.join(odd)}: {found.detail[:230]} {found.place}"


def main() -> int:
    torch.set_num_threads(1)
    torch.backends.cudnn.deterministic = True  # Gradients with a monitor and without are compared bit for bit.
    torch.backends.cudnn.allow_tf32 = False  # The yardstick's numbers have more than three digits.
    args = arguments()
    only, skip = (tuple(filter(None, text.split(","))) for text in (args.only, args.skip))
    if args.case is not None:
        case, found = shrunk(replace(drawn(args.case, only, skip), device=args.device))
        print(f"# {told(case, found)}", "" if found.kind == "exact" else program(case), sep="\n")
        return int(found.kind in FAILURES)
    return run(args, only, skip)


def run(args: argparse.Namespace, only: Sequence[str], skip: Sequence[str]) -> int:
    """Cases until the time is over or somebody interrupts, and then the counts; returns whether something failed."""
    counts: collections.Counter[str] = collections.Counter()
    repeated: collections.Counter[str] = collections.Counter()
    first: dict[str, int] = {}
    seed, end = args.seed * 10**7, time.monotonic() + args.seconds
    try:
        while time.monotonic() < end:
            case = replace(drawn(seed, only, skip), device=args.device)
            found = outcome(case)
            counts[found.kind] += 1
            if found.kind in ("crashed", "refused", "rounded"):
                cause = f"{found.kind}: {found.place or found.detail[:70]}"
                repeated[cause] += 1
                first.setdefault(cause, seed)
            if found.kind in FAILURES and (found.kind != "crashed" or repeated[cause] == 1):
                print(told(*shrunk(case)), flush=True)
            seed += 1
    except KeyboardInterrupt:
        print(f"interrupted at --case {seed}")
    for cause, many in repeated.most_common(40):
        print(f"{many} {cause} (first: --case {first[cause]})")
    print(table(counts))
    return int(any(counts[kind] for kind in FAILURES))


def table(counts: collections.Counter[str]) -> str:
    """How many cases there were of each outcome."""
    whole = max(sum(counts.values()), 1)
    kinds = [
        "exact",
        "coupled",
        "frozen",
        "hidden",
        "unseen",
        "refused",
        "wrong",
        "crashed",
        "inconsistent",
        "rounded",
        "impossible",
    ]
    return "\n".join(f"{kind:13} {counts[kind]:7} {counts[kind] / whole:7.2%}" for kind in kinds)


if __name__ == "__main__":
    sys.exit(main())
