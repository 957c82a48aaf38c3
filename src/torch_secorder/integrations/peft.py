"""Ranks for PEFT's adapters, from a report."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args

from torch_secorder.arguments import RankUnit, called_as, require_choice, require_positive_int
from torch_secorder.errors import ArgumentError
from torch_secorder.tables import shape_of

if TYPE_CHECKING:
    import pandas as pd


@called_as(
    "rank_pattern(report, budget), where report is a report by parameter and budget the rank that all layers would have"
)
def rank_pattern(
    report: pd.DataFrame,
    budget: int,
    *,
    unit: RankUnit = "rank",
    modules: Callable[[str], bool] | None = None,
) -> dict[str, int]:
    r"""A rank for each linear layer's low-rank adapter, as PEFT's ``LoraConfig(rank_pattern=...)`` takes it.

    An adapter of rank r has :math:`r (o + i)` parameters for a weight of shape (o, i). The part of the layer's Fisher trace
    :math:`F_m` that it cannot reach is assumed to be :math:`F_m / r_m`; the ranks minimize the sum of these parts over the
    layers within the budget,

    .. math:: \min_{r_m \ge 1} \sum_m \frac{F_m}{r_m} \quad\text{with}\quad \sum_m r_m\, (o_m + i_m) \le \text{budget},

    by giving one more rank, as long as one fits, to the layer that gains the most per parameter. Without rounding the ranks are
    proportional to :math:`\sqrt{F_m / (o_m + i_m)}`. A trace does not tell how fast a layer's gain really falls.

    Args:
        report: a report by parameter, of the model without adapters; with ``parameters="all"`` if its weights are frozen.
        budget: the size of all adapters, in ``unit``.
        unit: "rank" for the number of parameters that this rank takes in every layer, or "parameters".
        modules: from a module's name to whether it gets an adapter; by default all modules with a weight of two axes get one,
            except embeddings.

    Returns:
        Module name -> rank, 1 at least. Pass its names as ``target_modules`` too, for adapters in these layers only.

    Raises:
        ArgumentError: if the report is not one by parameter, no layer gets an adapter, or not even rank 1 everywhere fits.

    Example:
        >>> import torch
        >>> from torch_secorder import fisher_report
        >>> from torch_secorder.integrations.peft import rank_pattern
        >>> layers = torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 16)
        >>> model = torch.nn.Sequential(*layers)
        >>> data = torch.randn(32, 32), torch.randint(16, (32,))
        >>> report = fisher_report(model, torch.nn.CrossEntropyLoss(), data, progress=False)
        >>> ranks = rank_pattern(report, budget=4)
        >>> sizes = {name: sum(model[int(name)].weight.shape) for name in ranks}
        >>> sum(r * sizes[name] for name, r in ranks.items()) <= 4 * (96 + 80)
        True
    """
    require_positive_int("budget", budget)
    require_choice("unit", unit, get_args(RankUnit))
    if modules is not None and not callable(modules):
        raise ArgumentError(
            f"modules must be a function from a module's name to whether it gets an adapter, not {modules!r}"
        )
    layers = _layers(report, modules)
    sizes = {name: sum(shape) for name, (shape, _) in layers.items()}
    left = budget * sum(sizes.values()) if unit == "rank" else budget
    left -= sum(sizes.values())
    if left < 0:
        raise ArgumentError(
            f"not even rank 1 everywhere fits: the budget must be at least {sum(sizes.values())} parameters"
        )
    ranks = dict.fromkeys(layers, 1)
    # One more rank takes F / (r (r + 1)) off a layer's term; the largest gain per parameter comes first.
    queue = [(-trace / 2 / sizes[name], name) for name, (_, trace) in layers.items()]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        (shape, trace), rank = layers[name], ranks[name]
        if sizes[name] > left or rank == min(shape) or not trace:
            continue  # what doesn't fit now never will
        ranks[name], left = rank + 1, left - sizes[name]
        heapq.heappush(queue, (-trace / ((rank + 1) * (rank + 2)) / sizes[name], name))
    return ranks


def _layers(report: Any, modules: Callable[[str], bool] | None) -> dict[str, tuple[tuple[int, ...], float]]:
    """Module name -> its weight's shape and Fisher trace, for those that get an adapter."""
    if missing := [
        c for c in ("module", "module_type", "shape", "fisher_trace") if c not in getattr(report, "columns", ())
    ]:
        raise ArgumentError(f"the report lacks {', '.join(missing)}: pass one by parameter, made without by=")
    found: dict[str, tuple[tuple[int, ...], float]] = {}
    for parameter, row in report.iterrows():
        name, shape = str(row["module"]), shape_of(row["shape"])
        wanted = modules(name) if modules is not None else row["module_type"] != "Embedding"
        if len(shape) == 2 and str(parameter).rpartition(".")[2] == "weight" and wanted:
            found[name] = (shape, float(row["fisher_trace"]))
    if not found:
        raise ArgumentError(
            "no module with a weight of two axes gets an adapter: look at the names that modules= lets through"
        )
    if bad := [name for name, (_, trace) in found.items() if not 0 <= trace < float("inf")]:
        raise ArgumentError(f"the Fisher trace of {bad[0]} is no number that is 0 or more")
    return found
