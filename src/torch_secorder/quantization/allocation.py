"""Who should get the bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch_secorder.arguments import require_choice
from torch_secorder.errors import ArgumentError
from torch_secorder.quantization.rounding import checked_bits
from torch_secorder.tables import table

if TYPE_CHECKING:
    import pandas as pd


def allocate_bits(sensitivity: pd.DataFrame, budget: float, *, unit: str = "bits per weight") -> pd.DataFrame:
    r"""The assignment of bits with the least predicted KL divergence of all that fit into a size.

    With :math:`k_{p,b}` the sensitivity and :math:`d_p` the number of entries,

    .. math:: \min_{b_1 \ldots b_P} \sum_p k_{p, b_p} \quad\text{with}\quad \sum_p d_p\, b_p \le \text{budget}.

    This multiple-choice knapsack is solved exactly, by branch and bound: scipy's :func:`scipy.optimize.milp`, which is HiGHS,
    with no gap between what it found and its bound. Steps and zero points are not in the size.

    Args:
        sensitivity: what :func:`quantization_sensitivity` returned; weights or activations, not both.
        budget: the size that must not be exceeded.
        unit: of the budget: "bits per weight" on average, so that 4 compares with 4 bits everywhere, or "bytes" or "bits"
            in all.

    Returns:
        A DataFrame with index ``parameter`` and columns ``numel``, ``bits`` and ``predicted``; ``attrs`` hold ``size`` in bits,
        ``bits_per_weight`` and ``predicted`` in total, and the scheme of the sensitivity.

    Raises:
        ArgumentError: if not even the fewest bits fit, naming the smallest budget, or the table is not a sensitivity.
        ImportError: without scipy: ``pip install 'torch-secorder[decide]'``.

    Example:
        >>> import torch
        >>> from torch_secorder import fisher_report
        >>> from torch_secorder.quantization import allocate_bits, quantization_sensitivity, uniform_bits
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> report = fisher_report(model, None, (torch.randn(32, 4), None), fisher="exact", progress=False)
        >>> sensitivity = quantization_sensitivity(model, report)
        >>> best = allocate_bits(sensitivity, budget=4)
        >>> best.attrs["bits_per_weight"] <= 4
        True
        >>> best.attrs["predicted"] <= uniform_bits(sensitivity, 4).attrs["predicted"]
        True
    """
    require_choice("unit", unit, ("bits per weight", "bytes", "bits"))
    costs, numel, widths = _choices(sensitivity)
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget > 0:
        raise ArgumentError(f"budget must be a positive number of {unit}, not {budget!r}")
    factor = {"bits per weight": sum(numel), "bytes": 8, "bits": 1}[unit]
    size = int(budget * factor + 1e-6)
    if min(widths) * sum(numel) > size:
        least = min(widths) * sum(numel) / factor
        raise ArgumentError(f"not even {min(widths)} bits everywhere fit: the budget must be at least {least:g} {unit}")
    return _allocation(sensitivity, [widths[c] for c in _cheapest(costs, numel, widths, size)])


def uniform_bits(sensitivity: pd.DataFrame, bits: int) -> pd.DataFrame:
    """The same number of bits everywhere, as a table like that of :func:`allocate_bits`, to compare with.

    Raises:
        ArgumentError: if the sensitivity has no such column.
    """
    if checked_bits(bits) not in _choices(sensitivity)[2]:
        raise ArgumentError(f"the sensitivity has no column for {bits} bits; add it to bits=")
    return _allocation(sensitivity, [bits] * len(sensitivity))


def _choices(sensitivity: pd.DataFrame) -> tuple[list[list[float]], list[int], list[int]]:
    """Costs by parameter and width, sizes, and widths."""
    columns = list(getattr(sensitivity, "columns", ()))
    widths = [c for c in columns if isinstance(c, int) or str(c).isdigit()]
    if not widths or "numel" not in columns or not len(sensitivity):
        raise ArgumentError("not a sensitivity: pass what quantization_sensitivity() returned, with one row at least")
    if "kind" in columns and len(set(sensitivity["kind"])) > 1:
        raise ArgumentError(
            "weights and activations have sizes that don't add up: allocate sensitivity[sensitivity['kind'] == 'weight'] "
            "and the activations apart"
        )
    costs = [[float(x) for x in row] for row in sensitivity[widths].to_numpy()]
    if any(not 0 <= x < float("inf") for row in costs for x in row):
        raise ArgumentError("the sensitivity has entries that are negative or not finite")
    return costs, [int(x) for x in sensitivity["numel"]], [int(c) for c in widths]


def _cheapest(costs: list[list[float]], numel: list[int], widths: list[int], size: int) -> list[int]:
    """The choice for each parameter, by an integer linear program with a 0/1 variable for each pair."""
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as error:
        raise ImportError("allocate_bits needs scipy: pip install 'torch-secorder[decide]'") from error
    everyone = max(b for b in widths if b * sum(numel) <= size)
    enough = sum(
        row[widths.index(everyone)] for row in costs
    )  # a solution; nothing dearer than all of it is worth a look
    if enough == 0:
        return [widths.index(everyone)] * len(costs)
    pairs = [(p, c) for p, row in enumerate(costs) for c in range(len(widths)) if row[c] <= enough * (1 + 1e-9)]
    # HiGHS stops at an absolute gap of 1e-6: the costs are scaled so that this is a billionth of a known solution.
    cost = np.array([costs[p][c] for p, c in pairs]) * (1e3 / enough)
    weight = np.array([numel[p] * widths[c] for p, c in pairs], dtype=float)
    one_each = csr_array((np.ones(len(pairs)), ([p for p, _ in pairs], range(len(pairs)))))
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(csr_array(weight[None]), -np.inf, size),
    ]
    answer = milp(
        cost,
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if answer.x is None:
        raise ArgumentError(f"the solver found no assignment: {answer.message}")
    chosen = {p: c for (p, c), x in zip(pairs, answer.x, strict=True) if x > 0.5}
    choice = [chosen[p] for p in range(len(costs))]
    # Tolerances of floating point must not spend a bit that isn't there.
    if sum(n * widths[c] for n, c in zip(numel, choice, strict=True)) > size:
        return _cheapest(costs, numel, widths, size - 1)
    return choice


def _allocation(sensitivity: pd.DataFrame, bits: list[int]) -> pd.DataFrame:
    costs, numel, widths = _choices(sensitivity)
    rows = [
        {"parameter": name, "numel": n, "bits": b, "predicted": row[widths.index(b)]}
        for name, n, b, row in zip(sensitivity.index, numel, bits, costs, strict=True)
    ]
    size = sum(n * b for n, b in zip(numel, bits, strict=True))
    total = sum(row["predicted"] for row in rows)
    facts = {"size": size, "bits_per_weight": size / max(1, sum(numel)), "predicted": total}
    scheme = {key: sensitivity.attrs[key] for key in ("scheme", "per") if key in sensitivity.attrs}
    return table(rows, "parameter", **facts, **scheme)
