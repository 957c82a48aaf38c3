"""Times a steady step under a monitor over a plain one, of each architecture that is exact: `python -m sweep --cost`.

In float32, in the batch on which the architecture was judged. Each process times steps with and without a monitor in
turn, by its own CPU time, and the fastest of each kind count: they are what other programs on the machine change least.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from torch_secorder import FisherMonitor

from .by_hand import by_hand
from .inputs import SAMPLES
from .judging import Wide, loss_of
from .making import Made
from .results import last_rows

COSTS = Path(__file__).with_name("costs.jsonl")
WARM, ROUNDS = 6, 9  # steps that look for samples and check, and pairs of timed steps


def seconds(step: Callable[[], None]) -> float:
    begun = time.process_time()
    step()
    return time.process_time() - begun


def cost(made: Made, paths: list[str]) -> dict[str, Any]:
    """A row of the costs: the milliseconds of a plain step, and what a first and a steady step take over it."""
    plain, watched, hooked = (Wide(copy.deepcopy(made.model).float(), torch.float32) for _ in range(3))
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in made.inputs.items()}

    def backward(model: nn.Module) -> None:
        loss_of(model(**inputs), paths).backward()

    def step(model: Wide) -> None:
        backward(model)
        model.zero_grad(set_to_none=True)

    step(plain)
    with FisherMonitor(watched, "sum") as monitor:
        first = seconds(lambda: step(watched))
        trace = float(monitor.trace)
        for _ in range(WARM - 1):
            step(watched)
        hand = known_by_hand(hooked, backward, trace)
        turns = [
            [seconds(lambda: step(plain)), seconds(lambda: step(watched)), *([seconds(hand)] if hand else [])]
            for _ in range(ROUNDS)
        ]
    least, steady, *of_hand = (min(times) for times in zip(*turns, strict=True))
    return {
        "outcome": "timed",
        "ms": round(1e3 * least, 2),
        "first": round(first / least, 2),
        "steady": round(steady / least, 2),
        **({"by hand": round(of_hand[0] / least, 2)} if of_hand else {}),
    }


def known_by_hand(model: Wide, backward: Callable[[nn.Module], None], trace: float) -> Callable[[], Any] | None:
    """The step by hand, if it gives this trace: it doesn't where a layer is none of those whose products it knows."""
    hand = by_hand(model, SAMPLES, backward)
    try:
        found = float(hand())
    except Exception:  # Whatever another layer does with these hooks, it has no step by hand.
        return None
    return hand if abs(found - trace) <= 1e-3 * abs(trace) else None


def exact_ones() -> dict[tuple[str, str], list[str]]:
    """The architectures to time, each with its outputs that the loss is about."""
    return {key: row["outputs"] for key, row in last_rows().items() if row["outcome"] == "exact"}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the documentation says of all costs together; nothing before there are some."""
    timed = [row for row in rows if row["outcome"] == "timed"]
    large = [row for row in timed if row["ms"] > 30]
    known = [row for row in timed if "by hand" in row]
    if not large:
        return {}
    return {
        "timed": len(timed),
        "median": median(row["steady"] for row in timed),
        "large": len(large),
        "median of large": median(row["steady"] for row in large),
        "by hand": {
            "of": len(known),
            "median": median([row["by hand"] for row in known] or [0.0]),
            "steady": median([row["steady"] for row in known] or [0.0]),
        },
        "over 4": sorted((row["steady"], row["name"]) for row in timed if row["steady"] > 4),
    }
