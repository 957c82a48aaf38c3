"""Writes the sweep's results and costs into the documentation: `python -m sweep.page`, docs/concepts/architectures.{rst,csv}."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .cost import COSTS, summary
from .inputs import SAMPLES
from .results import Key, last_rows, tidied

PAGE = Path(__file__).parents[2] / "docs/concepts/architectures.rst"
TABLE = PAGE.with_suffix(".csv")
ORDER = ("exact", "refused", "crashed", "wrong", "coupled", "not made", "not run")
HEAD = """\
Other people's architectures
============================

.. This page is written by `make sweep`; do not edit it.

Every architecture that transformers, timm, vit-pytorch, x-transformers and segmentation-models-pytorch list is made as
small as its configuration allows, with sizes that are chosen by the names of attributes, and called with random inputs
that are chosen by the names of arguments. The loss is, for every output that depends on one sample alone, its squared
distance to a ramp. The truth is a float64 loop over samples alone through plain autograd (float32 where a model knows no
other). Each model is looked at by :class:`~torch_secorder.FisherMonitor` and by
:func:`~torch_secorder.fisher_report`, in evaluation mode, as it begins and with noise on its parameters.

- **exact**: each parameter's trace is that of the loop, to 1e-5 in float64 (3e-3 in float32).
- **refused**: the library raises an error of its own. The outcome is that of the worse of both ways.
- **crashed**: an exception that is not of this library.
- **wrong**: a number that is not that of the loop, without an error.
- **coupled**: no output of a sample alone is that which it has in its batch, so that there is no number to be right about.
- **not made**: excluded, for the reason that stands beside it. It says nothing about the library.

"""


def rows() -> list[dict[str, Any]]:
    """The last row of each architecture, in the order in which they were listed."""
    return sorted(last_rows().values(), key=lambda row: (SOURCES.index(row["source"]), row["name"]))


SOURCES = ("transformers", "timm", "vit-pytorch", "x-transformers", "segmentation-models-pytorch")


def escaped(text: str) -> str:
    """What stands in a cell as it is: no markup."""
    return re.sub(r"([\\`*_|])", r"\\\1", text)


def remark(row: dict[str, Any]) -> str:
    """Why it was not made, or what was said that is not "exact", in the first words."""
    said = {
        key: row[key]
        for key in ("monitor", "report", "monitor opened", "report opened")
        if row.get(key, "exact") != "exact"
    }
    if row["outcome"] == "not made":
        return re.sub(r"/\S+/", "", row["reason"])[:160]
    if row["outcome"] == "not run":
        return ""
    short = {key: re.match(r"(\w+(?: \w+Error)?)", text)[0] for key, text in said.items()}
    beside = (
        f"not in the loss: {', '.join(row['coupled'])}" if row["outcome"] != "coupled" and row.get("coupled") else ""
    )
    return "; ".join([*(f"{key}: {text}" for key, text in short.items()), *([beside] if beside else [])])[:160]


def cells(row: dict[str, Any], costs: dict[Key, dict[str, Any]]) -> list[str]:
    cost = costs.get((row["source"], row["name"]), {})
    inputs = ", ".join(row.get("inputs", {}))
    return [
        row["source"],
        row["name"],
        f"{row.get('parameters', 0):,}" if "parameters" in row else "",
        inputs,
        row["outcome"],
        f"{cost['ms']:.1f}" if "ms" in cost else "",
        f"{cost['steady']:.1f}" if "steady" in cost else "",
        remark(row),
    ]


def counts(all_rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    for source in SOURCES:
        by = Counter(row["outcome"] for row in all_rows if row["source"] == source)
        if by:
            yield [source, *(str(by[outcome]) for outcome in ORDER)]


def listed(lines: list[list[str]], header: list[str]) -> str:
    """An rst table."""
    text = [".. list-table::", "   :header-rows: 1", ""]
    for line in [header, *lines]:
        text += [f"   {'*' if not place else ' '} - {cell}" for place, cell in enumerate(line)]
    return "\n".join(text) + "\n"


def price(costs: list[dict[str, Any]]) -> str:
    """What a steady step costs, in a paragraph."""
    if not (found := summary(costs)):
        return ""
    hand = found["by hand"]
    slow = ", ".join(f"{name} {ratio:.1f}" for ratio, name in found["over 4"][::-1]) or "none"
    return (
        f"A steady step under a monitor (float32, {SAMPLES} samples, one thread) takes {found['median']:.1f} plain steps "
        f"in the median of {found['timed']} architectures that were timed, most of whose steps take a few milliseconds, and "
        f"{found['median of large']:.1f} in the median of the {found['large']} whose plain step takes more than 30 ms. "
        f"More than 4: {slow}. The table has the plain step in ms, and a steady step over it.\n\n"
        f"The same products, called by hand from plain hooks with no check and no bookkeeping, take {hand['median']:.1f} in the "
        f"median of the {hand['of']} architectures whose layers they know, where a monitor takes {hand['steady']:.1f}: the "
        "difference is what checks and bookkeeping cost where a plain step takes two milliseconds.\n"
    )


def main() -> None:
    tidied()
    tidied(COSTS)
    found, costs = rows(), last_rows(COSTS)
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["library", "architecture", "parameters", "inputs", "outcome", "ms", "steady", "remark"])
        writer.writerows([escaped(cell) for cell in cells(row, costs)] for row in found)
    options = {"file": TABLE.name, "header-rows": "1", "widths": "20 20 13 17 12 8 8 25", "class": "words"}
    table = "".join([".. csv-table::\n", *(f"   :{name}: {value}\n" for name, value in options.items())])
    PAGE.write_text(
        HEAD + listed(list(counts(found)), ["library", *ORDER]) + "\n" + price([*costs.values()]) + "\n" + table
    )


if __name__ == "__main__":
    main()
