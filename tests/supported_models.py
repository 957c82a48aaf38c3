"""Runs every model of the zoo and writes docs/concepts/supported_models.rst: `python tests/supported_models.py`."""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from pathlib import Path

import torch

from models import CASES, Case, Outcome, outcome, ways

PAGE = Path(__file__).parents[1] / "docs/concepts/supported_models.rst"
HEAD = """\
Supported models
================

.. This page is written by `python tests/supported_models.py`; do not edit it.

Every model here ran in a tiny random configuration, at its real code in transformers, peft or torch, in float32 and in
float64, once under a :class:`~torch_secorder.FisherMonitor` around the forward and backward pass and once through
:func:`~torch_secorder.fisher_report` with its self-verification. Each parameter's trace was compared with that of plain
autograd on one sample after the other, in float64. The errors are the worst relative ones over all settings, ways and
parameters, without those parameters whose gradient is zero but for rounding. Models that cast to float32 inside, as many
norms do, were kept from it in float64.

.. list-table::
   :header-rows: 1
   :widths: 21 23 13 10 9 9 21
   :class: words

   * - architecture
     - settings
     - parameters
     - answer
     - float32
     - float64
     - rules
"""


def rows() -> list[tuple[str, list[Case]]]:
    """The cases of each architecture, whose settings follow a comma."""
    found: dict[str, list[Case]] = defaultdict(list)
    for case in CASES:
        found[case.architecture.partition(", ")[0]].append(case)
    return list(found.items())


def answer(outcomes: dict[tuple[Case, str, torch.dtype], Outcome]) -> str:
    """In words: exact, or what of it is refused."""
    if any(found.wrong for found in outcomes.values()):
        return "WRONG"
    refused = {(case, way) for (case, way, _), found in outcomes.items() if found.refusal}
    if len(refused) == len({(case, way) for case, way, _ in outcomes}):
        return "refused"
    names = {"monitor": "FisherMonitor", "report": "fisher_report"}
    parts = ["exact"]
    for way, name in names.items():
        if cases := [case for case, other in refused if other == way]:
            parts.append(f"{name} refuses: {settings(cases) or 'always'}")
    return "; ".join(parts)


def settings(cases: list[Case]) -> str:
    """What follows the first comma in each, without repetitions."""
    return ", ".join(dict.fromkeys(part for case in cases for part in case.architecture.split(", ")[1:]))


def cells(architecture: str, cases: list[Case]) -> list[str]:
    outcomes = {
        (case, way, dtype): outcome(case, way, dtype) for case in cases for way in ways for dtype in case.dtypes
    }
    worst = {
        dtype: max((found.worst for (_, _, d), found in outcomes.items() if d == dtype and found.errors), default=None)
        for dtype in (torch.float32, torch.float64)
    }
    sizes = [sum(p.numel() for p in case.setting(case.dtypes[0]).model.parameters()) for case in cases]
    kinds = sorted({rule.partition(" (")[0] for found in outcomes.values() for rule in found.rules} - {"unused"})
    return [
        architecture,
        settings(cases),
        f"{min(sizes):,}" + (f" to {max(sizes):,}" if max(sizes) > min(sizes) else ""),
        answer(outcomes),
        *("" if error is None else f"{error:.0e}" for error in worst.values()),
        "; ".join(kinds),
    ]


def page() -> str:
    lines = [HEAD.rstrip()]
    for architecture, cases in rows():
        print(architecture, file=sys.stderr)
        first, *rest = cells(architecture, cases)
        lines += [f"   * - {first}", *(f"     - {cell}".rstrip() for cell in rest)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    PAGE.write_text(page())
    sys.exit("WRONG" in PAGE.read_text())
