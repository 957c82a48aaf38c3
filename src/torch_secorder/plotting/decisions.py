"""Pictures of the decisions that are made with a report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch_secorder.errors import ArgumentError
from torch_secorder.plotting.axes import (
    COLORS,
    GREY,
    MARKERS,
    axes_of,
    matplotlib,
    name_rows,
    setting,
    settings,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def sensitivity_by_bits(
    sensitivity: pd.DataFrame, *, allocation: pd.DataFrame | None = None, ax: Axes | None = None
) -> Axes:
    """The predicted KL divergence of each layer and number of bits (or sparsity), as a table of colors.

    Args:
        sensitivity: a table from ``quantization_sensitivity`` or ``pruning_sensitivity``.
        allocation: a table from ``allocate_bits``; a dot marks each layer's choice.
        ax: the Axes to draw into; by default those of a new figure.

    Raises:
        ArgumentError: if the table is not a sensitivity, or the allocation has other rows.

    Example:
        >>> import pandas as pd
        >>> from torch_secorder.plotting import sensitivity_by_bits
        >>> columns = {"numel": [6, 8], 2: [0.1, 0.2], 4: [0.01, 0.05]}
        >>> sensitivity = pd.DataFrame(columns, index=["first", "second"])
        >>> [label.get_text() for label in sensitivity_by_bits(sensitivity).get_xticklabels()]
        ['2', '4']
    """
    widths = settings(sensitivity)
    if not widths or not len(sensitivity):
        raise ArgumentError("not a sensitivity: pass what quantization_sensitivity() or pruning_sensitivity() returned")
    cells = [[float(v) if v > 0 else math.nan for v in row] for row in sensitivity[widths].to_numpy()]
    seen = [v for row in cells for v in row if not math.isnan(v)] or [1.0]
    ax = axes_of(ax, height=max(2.6, 0.22 * len(sensitivity) + 1.5))
    colors = matplotlib("cm").viridis.with_extremes(bad="#cccccc")
    norm = matplotlib("colors").LogNorm(min(seen), max(*seen, min(seen) * 1.01))
    image = ax.imshow(cells, aspect="auto", cmap=colors, norm=norm, interpolation="nearest")
    ax.set_xticks(range(len(widths)), [setting(c) for c in widths])
    ax.set_xlabel("sparsity" if any(isinstance(c, float) for c in widths) else "bits")
    if allocation is not None:
        if list(allocation.index) != list(sensitivity.index):
            raise ArgumentError("the allocation is of other rows than the sensitivity")
        columns = [int(c) for c in widths]
        places = [columns.index(int(b)) for b in allocation["bits"]]
        ax.plot(
            places, range(len(places)), "o", color="white", markeredgecolor="black", markersize=5, label="allocated"
        )
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    name_rows(ax, sensitivity)
    ax.spines[:].set_visible(False)
    ax.figure.colorbar(image, ax=ax, label="predicted KL divergence\n(nats per sample)", pad=0.02)
    return ax


def predicted_against_measured(pairs: Mapping[str, tuple[Any, Any]], *, ax: Axes | None = None) -> Axes:
    """Points on logarithmic axes, a color for each setting, with the diagonal where both agree.

    Args:
        pairs: label -> (predicted, measured), two sequences of equal length. Points that are not positive are left out; the
            legend gives their number.
        ax: the Axes to draw into; by default those of a new figure.

    Raises:
        ArgumentError: for sequences of different lengths, or no positive point.

    Example:
        >>> from torch_secorder.plotting import predicted_against_measured
        >>> ax = predicted_against_measured({"4 bits": ([0.1, 0.2], [0.11, 0.18])})
        >>> ax.get_xscale(), ax.get_xlabel()
        ('log', 'measured KL divergence (nats per sample)')
    """
    if not isinstance(pairs, Mapping):
        raise ArgumentError(f"pass a mapping from labels to pairs of sequences, not a {type(pairs).__name__}")
    drawn: list[float] = []
    left_out = 0
    found = {}
    for label, (predicted, measured) in pairs.items():
        xs, ys = [float(v) for v in measured], [float(v) for v in predicted]
        if len(xs) != len(ys):
            raise ArgumentError(f"{label}: {len(ys)} predictions for {len(xs)} measurements")
        good = [(x, y) for x, y in zip(xs, ys, strict=True) if x > 0 and y > 0 and math.isfinite(x + y)]
        left_out += len(xs) - len(good)
        drawn += [v for point in good for v in point]
        found[label] = good
    if not drawn:
        raise ArgumentError("there is no point with a positive prediction and a positive measurement")
    ax = axes_of(ax, height=5.0, width=5.5)
    for number, (label, good) in enumerate(found.items()):
        style: dict[str, Any] = {"marker": MARKERS[number % 6], "color": COLORS[number % 6]}
        ax.scatter([x for x, _ in good], [y for _, y in good], s=22, alpha=0.75, linewidths=0, label=label, **style)
    low, high = min(drawn) / 1.5, max(drawn) * 1.5
    ax.plot([low, high], [low, high], color=GREY, lw=1, zorder=0, label="equal")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(low, high)
    ax.set_ylim(low, high)
    ax.set_aspect("equal")
    ax.set_xlabel("measured KL divergence (nats per sample)")
    ax.set_ylabel("predicted KL divergence (nats per sample)")
    ax.legend(frameon=False, title=f"{left_out} points not positive" if left_out else None)
    ax.spines[["top", "right"]].set_visible(False)
    return ax
