"""Writes docs/concepts/performance.rst and its figures from what was measured: `python -m benchmarks.page`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import saved
from benchmarks.variants import ALONE, BOUNDS, OURS, PEERS, VARIANTS
from benchmarks.workloads import WORKLOADS

DOCS = Path(__file__).parents[2] / "docs"
RowSparse = dict[str, dict[str, Any]]

HEAD = """\
Performance
===========

.. This page is written by `make bench` and `make bench-growth`; do not edit it.

What the exact numbers cost, over a plain step: a forward and a backward pass with parameter gradients. 1.00 is the price
of the step that was running anyway;
:func:`~torch_secorder.approximations.fisher_trace.empirical_fisher_trace` needs no parameter gradients, and can be cheaper
than it.
"""
READING = """\
How to read it
--------------

* **FisherMonitor** is a block around one step: hooks on, the step, hooks off, and the trace read. (What a monitor learns about
  a model is kept for later monitors; only the very first block also searches for the samples.) **In a loop** is one step of many
  inside of one block. **Diagonal** is a block around one step that keeps the Fisher diagonal too.
* **Every measurement comes after nine steps**, since the first ones search for the samples and check more: the 1st, 2nd, 3rd,
  5th, 9th, 17th and so on. A block around a single step checks in each.
* **The floor** is the share of a plain step that forward and input gradients take: of its operations (those of matrix products
  and convolutions), of its bytes (all that operations read and write, as if nothing stayed in a cache), and of its time, measured
  with all parameters frozen and gradients up to the first layers' outputs. A function whose norms cost nothing has about this
  ratio; a monitor has 1. Small layers are bound by their bytes. A plain step also pays for fresh memory pages for large
  gradients, which neither count includes, and a fused LSTM computes its weights' gradients even if they are not needed.
* **The bounds** are what the same numbers cost by hand (``tests/benchmarks/bounds.py``): the best products known, called from
  plain hooks, with no check and no bookkeeping. One is for a step of a loop, the other for a function, without gradients of
  parameters. What the first takes above 1, and the second above the floor, is the price of the products; what the library takes
  above a bound is the price of its checks and its bookkeeping.
* **Time** is the processor's, of one process with one thread, with glibc's default allocator. Every run stands between two
  plain steps, and is divided by their mean; variants take turns, and the page shows the median over the rounds.
* **Memory** is the peak of a process during its first three steps, above what it holds with model and batch loaded, relative to
  that of a plain step. Each variant runs in fresh processes.
* **Numbers are checked first** against a loop over single samples in float64. A ratio with a mark is the price of
  another number, or of a part of it; the notes say which. A dash is a variant that refuses
  or was not run.
"""
COMPILED = """\
Why nothing is compiled
-----------------------

``torch.compile`` on the algebra's inner functions gains too little to pay for its first call (one core, torch 2.13, gcc): a
layer norm's two sums for 16 x 64 positions of 128 features take 0.11 ms instead of 0.22, which is 1 % of a step of the encoder
above; the squares of a product of 256 samples with 1,024 features 0.09 instead of 0.13; Gram matrices and their product
1.08 instead of 1.06. The first call takes 30 seconds. The products run in the same library either way.
"""
REPRODUCE = """\
How to reproduce it
-------------------

``make bench`` measures time and memory and writes this page; ``make bench-growth`` does the same for growth. Both take a
while. One row alone::

    PYTHONPATH=tests python -m benchmarks.speed --workloads mlp --variants monitor functional
"""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], widths: Sequence[int]) -> list[str]:
    """A list-table, as lines."""
    lines = [".. list-table::", "   :header-rows: 1", f"   :widths: {' '.join(map(str, widths))}", ""]
    for row in (head, *rows):
        lines += [f"   {'*' if number == 0 else ' '} - {cell}".rstrip() for number, cell in enumerate(row)]
    return [*lines, ""]


def ratio(row: RowSparse, name: str) -> str:
    """A variant's ratio, with a mark where its number is not the whole one."""
    found = row.get(name, {})
    if "ratio" not in found:
        return "–"
    mark = "" if is_exact(found) else " \\*"
    return f"{found['ratio']:.2f}{mark}"


def is_exact(found: dict[str, Any]) -> bool:
    return found.get("verdict", "").startswith("exact") or not found.get("verdict")


def speed(rows: dict[str, RowSparse]) -> list[str]:
    """Ours and the floors; then the peers, and what is wrong with their numbers."""
    ours = [
        [
            WORKLOADS[name].label,
            f"{row['plain']['milliseconds']:.0f}",
            "{operations:.2f}, {bytes:.2f}, ".format(**row["plain"]["floor"]) + ratio(row, ALONE),
            ", ".join(ratio(row, bound) for bound in BOUNDS.values()),
            *(ratio(row, variant) for variant in OURS),
        ]
        for name, row in rows.items()
    ]
    head = ["workload", "plain, ms", "floor: operations, bytes, time", "bound: in a loop, function"]
    head += [VARIANTS[name].label for name in OURS]
    peers = [[WORKLOADS[name].label, *(ratio(row, peer) for peer in PEERS)] for name, row in rows.items()]
    return [
        *section("Time, over a plain step"),
        *table(head, ours, [30, 8, 12, 12, *[11] * len(OURS)]),
        *(".. image:: ../performance.png", "   :alt: Time over a plain step, by workload: ours and exact peers.", ""),
        *section("Other packages' time, over a plain step"),
        *table(["workload", *(VARIANTS[name].label for name in PEERS)], peers, [30, *[11] * len(PEERS)]),
        *notes(rows),
    ]


def notes(rows: dict[str, RowSparse]) -> list[str]:
    """What is wrong with the numbers that have a mark, and why there are dashes."""
    lines = ["What is wrong or missing there:", ""]
    for name, row in rows.items():
        told = [
            f"{VARIANTS[peer].label}: {row[peer]['verdict']}"
            for peer in PEERS
            if peer in row and not is_exact(row[peer])
        ]
        if told:
            lines += [f"* {WORKLOADS[name].label}", "", *(f"  * {literal(line)}" for line in told), ""]
    return lines


def literal(text: str) -> str:
    """Text with nothing in it that reStructuredText would read as markup."""
    return "".join(f"\\{c}" if c in "*_`|\\" else c for c in text)


def memory(rows: dict[str, RowSparse]) -> list[str]:
    """Ours, then the peers: all in one table would be wider than a page."""
    lines = []
    for title, names in (("Memory", OURS), ("Other packages' memory", PEERS)):
        cells = [
            [WORKLOADS[name].label, f"{row['plain']['mib']:.0f}", *(ratio(row, variant) for variant in names)]
            for name, row in rows.items()
        ]
        head = ["workload", "plain, MiB", *(VARIANTS[name].label for name in names)]
        lines += [*section(f"{title}, over a plain step"), *table(head, cells, [30, 8, *[11] * len(names)])]
    return lines


def growth(rows: dict[str, RowSparse], processor: str) -> list[str]:
    names = [name for name in VARIANTS if name in next(iter(rows.values()))]
    cells = []
    for axis, row in rows.items():
        sizes = row["plain"]["sizes"]
        for kind, what in (("milliseconds", "time"), ("mib", "memory")):
            slopes = [f"{row[name]['slopes'][kind]:.2f}" if name in row else "–" for name in names]
            cells.append([f"{axis}, {sizes[0]:,} to {sizes[-1]:,}", what, *slopes])
    return [
        *section("Growth"),
        "Slopes between logarithms for a GPT-2-like model of two layers, one of whose sizes grows, over the larger half of the",
        f"sizes: 1 is in proportion, 2 is as the square. Measured on {processor}.",
        "",
        *table(["size", "of", *(VARIANTS[name].label for name in names)], cells, [30, 10, *[15] * len(names)]),
        *(".. image:: ../growth.png", "   :alt: Time and memory against batch, positions, width and vocabulary.", ""),
    ]


# What the formulas of docs/concepts/scaling.rst say: from the terms of the lowest order to those of the highest.
PREDICTED = {
    "batch": "1",
    "positions": "1 to 2",
    "width": "1 to 2",
    "depth": "1",
    "vocabulary": "1",
    "classes": "1 to 2",
    "seeds": "1",
    "batches": "1",
}


def scaling(rows: dict[str, RowSparse]) -> list[str]:
    """Slopes of time as predicted and as measured."""
    cells = []
    for axis, row in rows.items():
        sizes = next(iter(row.values()))["sizes"]
        found = [row.get(name) or row.get("fisher_report") for name in ("plain", "monitor_loop", "functional")]
        told = [f"{x['slopes']['milliseconds']:.2f}" if x else "–" for x in found]
        told[0] = "–" if "plain" not in row else told[0]
        if "fisher_report" in row:
            told[1] = "–"
        cells.append([f"{axis}, {sizes[0]:,} to {sizes[-1]:,}", PREDICTED[axis], *told])
    names = ["plain step", "a monitor", "a function, without parameter gradients"]
    return table(["size", "predicted", *names], cells, [30, 12, 15, 15, 20])


def section(title: str) -> list[str]:
    return [title, "-" * len(title), ""]


def machine(found: dict[str, Any]) -> list[str]:
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    return [
        f"Measured on one thread of {found['processor']} ({found['cores']} cores), {found['system']}, "
        f"Python {found['python']};",
        f"{packages}.",
        "",
    ]


def ordered(rows: dict[str, RowSparse], names: Iterable[str]) -> dict[str, RowSparse]:
    return {name: rows[name] for name in names if name in rows}


def draw_speed(rows: dict[str, RowSparse], path: Path) -> None:
    """A line for each workload, a mark for each variant whose number is exact; the peers' are lower; bars are the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles = {"functional": ("o", "C0"), "monitor_loop": ("D", "C2"), "monitor": ("s", "C1")}
    peers = {"batch_l2": "v", "sum_grad_squared": "^", "opacus": "<", "ghost": ">", "vmap": "X", "loop": "P"}
    styles |= {name: (marker, "0.55") for name, marker in peers.items()}
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.5 * len(rows)), layout="constrained")
    for name, (marker, color) in styles.items():
        exact = [
            (row[name]["ratio"], y if name in OURS else y + 0.25)
            for y, row in enumerate(rows.values())
            if "ratio" in row.get(name, {}) and is_exact(row[name])
        ]
        if exact:
            x, y = zip(*exact, strict=True)
            ours = name in OURS
            axes.scatter(
                x, y, s=60 if ours else 45, marker=marker, c=color, label=VARIANTS[name].label, zorder=2 + ours
            )
    floors = [row[ALONE]["ratio"] for row in rows.values()]
    axes.scatter(floors, range(len(rows)), s=160, marker="|", c="black", label="without parameter gradients")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="time over a plain step (1 is a plain step)", xlim=(0.35, 200))
    ticks = (0.5, 1, 2, 5, 10, 20, 50, 100)
    axes.set_xticks(ticks, map(str, ticks), minor=False)
    axes.set_yticks(range(len(rows)), [WORKLOADS[name].label.partition(",")[0] for name in rows])
    axes.invert_yaxis()
    axes.grid(axis="y", color="0.9")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=130)


def draw_growth(rows: dict[str, RowSparse], path: Path) -> None:
    """Time above, memory below, a column for each size that grows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles = {"plain": ("black", "--"), "functional": ("C0", "-"), "monitor_loop": ("C2", "-"), "monitor": ("C1", "-")}
    figure, grid = pyplot.subplots(2, len(rows), figsize=(3.1 * len(rows), 5.6), layout="constrained", squeeze=False)
    for column, (axis, row) in enumerate(rows.items()):
        for line, (kind, unit) in enumerate((("milliseconds", "time, ms"), ("mib", "peak memory, MiB"))):
            axes = grid[line][column]
            for name, (color, style) in styles.items():
                if name in row:
                    values, label = row[name][kind], VARIANTS[name].label
                    axes.loglog(row[name]["sizes"], values, style, color=color, marker=".", label=label)
            axes.grid(color="0.9")
            axes.set_xlabel(axis)
            if column == 0:
                axes.set_ylabel(unit)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=130)


def draw_scaling(rows: dict[str, RowSparse], path: Path) -> None:
    """Time against every size that grows, both over their smallest, so that slopes can be seen side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    titles = {
        "monitor_loop": "FisherMonitor, in a loop",
        "functional": "functions: one call for a batch, or fisher_report",
    }
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for axis, row in rows.items():
            if found := row.get(name) or (row.get("fisher_report") if name == "functional" else None):
                size, time = found["sizes"], found["milliseconds"]
                axes.loglog([x / size[0] for x in size], [y / time[0] for y in time], marker=".", label=axis)
        ends = (1, 64)
        axes.loglog(ends, ends, ":", color="0.6")
        axes.loglog(ends, (1, 64**2), ":", color="0.6")
        axes.set(title=title, xlabel="size over the smallest", ylim=(0.7, 2000))
        axes.grid(color="0.9")
        axes.legend(fontsize=8)
    panels[0].set_ylabel("time over the smallest's; dotted: slopes 1 and 2")
    figure.savefig(path, dpi=130)


def main() -> None:
    lines = [HEAD]
    times, peaks, sizes = saved("speed"), saved("memory"), saved("growth")
    if rows := ordered(times["rows"], WORKLOADS):
        lines += [*machine(times["machine"]), *speed(rows)]
        draw_speed(rows, DOCS / "performance.png")
    if rows := ordered(peaks["rows"], WORKLOADS):
        lines += memory(rows)
    if rows := ordered(sizes["rows"], ("batch", "positions", "width", "vocabulary")):
        lines += growth(rows, sizes["machine"]["processor"])
        draw_growth(rows, DOCS / "growth.png")
    if rows := ordered(sizes["rows"], PREDICTED):
        (DOCS / "concepts/scaling_slopes.txt").write_text("\n".join(scaling(rows)))
        draw_scaling(rows, DOCS / "scaling.png")
    lines += [READING, COMPILED, REPRODUCE]
    (DOCS / "concepts/performance.rst").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
