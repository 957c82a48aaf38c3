"""The allocation of bits to parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, get_args

from torch_secorder.arguments import BudgetUnit, called_as, is_number, require_choice
from torch_secorder.errors import ArgumentError
from torch_secorder.quantization.rounding import checked_bits
from torch_secorder.tables import table

if TYPE_CHECKING:
    import pandas as pd


# Widths at which a weight is a floating-point number and is not rounded.
NOT_ROUNDED = (16, 32, 64)


@called_as(
    "allocate_bits(sensitivity, budget), where sensitivity is what quantization_sensitivity(model, report) returned, and budget "
    "the mean of the bits per weight",
    bits="budget= says how many bits there are per weight, and quantization_sensitivity(bits=) which numbers there may be",
)
def allocate_bits(
    sensitivity: pd.DataFrame,
    budget: float,
    *,
    unit: BudgetUnit = "bits per weight",
    groups: Callable[[str], object] | Iterable[Iterable[str]] = (),
    fixed: Mapping[str, int] | None = None,
) -> pd.DataFrame:
    r"""The assignment of bits with the least predicted KL divergence among all that fit into a budget.

    With :math:`k_{p,b}` the sensitivity and :math:`d_p` the number of entries,

    .. math:: \min_{b_1 \ldots b_P} \sum_p k_{p, b_p} \quad\text{with}\quad \sum_p d_p\, b_p \le \text{budget}.

    This multiple-choice knapsack is solved exactly, by branch and bound: scipy's :func:`scipy.optimize.milp`, which is HiGHS,
    with no gap between its solution and its bound. The size does not include steps and zero points.

    Args:
        sensitivity: the result of :func:`quantization_sensitivity`, for weights or for activations, not both.
        budget: the size that must not be exceeded.
        unit: the unit of the budget: "bits per weight" on average, so that 4 compares with 4 bits everywhere, or "bytes" or
            "bits" in total.
        groups: parameters that get the same number of bits, such as the q, k and v of a layer: tuples of names, or a function
            from a name to its group, None for a parameter of its own.
        fixed: patterns of names -> bits, for parameters whose bits are given: one of the table's columns, or 16, 32 or 64 for
            floating-point numbers that are not rounded and cost only their size, if that is not a column. Of several
            patterns that match, the last counts.

    Returns:
        A DataFrame with index ``parameter`` and columns ``numel``, ``bits`` and ``predicted``; ``attrs`` hold ``size`` in bits,
        ``bits_per_weight`` and ``predicted`` in total, the scheme of the sensitivity, and ``not_rounded``, the names of the
        parameters that ``fixed`` leaves unrounded, if there are any.

    Raises:
        ArgumentError: if not even the fewest bits fit, naming the smallest budget; if the table is not a sensitivity; or for
            groups and patterns of parameters that it does not have.
        ImportError: without scipy: ``pip install 'torch-secorder[decide]'``.

    Example:
        >>> import torch
        >>> from torch_secorder import fisher_report
        >>> from torch_secorder.quantization import allocate_bits, uniform_bits
        >>> from torch_secorder.quantization import quantization_sensitivity
        >>> layers = torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
        >>> model = torch.nn.Sequential(*layers)
        >>> data = torch.randn(32, 4), None
        >>> report = fisher_report(model, None, data, fisher="exact", progress=False)
        >>> sensitivity = quantization_sensitivity(model, report)
        >>> best = allocate_bits(sensitivity, budget=4)
        >>> best.attrs["bits_per_weight"] <= 4
        True
        >>> best.attrs["predicted"] <= uniform_bits(sensitivity, 4).attrs["predicted"]
        True
    """
    require_choice("unit", unit, get_args(BudgetUnit))
    sensitivity = _by_parameter(sensitivity)
    costs, numel, widths = _choices(sensitivity)
    if not is_number(budget) or not 0 < budget < math.inf:
        raise ArgumentError(f"budget must be a positive number of {unit} that is finite, not {budget!r}")
    factor = {"bits per weight": sum(numel), "bytes": 8, "bits": 1}[unit]
    size = int(float(budget) * factor + 1e-6)
    names = [str(name) for name in sensitivity.index]
    stays = _fixed(names, fixed or {}, widths)
    members = _members(names, groups, stays)
    spent = sum(numel[p] * b for p, b in stays.items())
    free = sum(numel) - sum(numel[p] for p in stays)
    if min(widths) * free + spent > size:
        least = (min(widths) * free + spent) / factor
        everywhere = "everywhere" if not stays else "for all that is not fixed"
        raise ArgumentError(
            f"not even {min(widths)} bits {everywhere} fit: the budget must be at least {least:g} {unit}"
        )
    bits = dict(stays)
    if members:
        together = [[sum(costs[p][c] for p in group) for c in range(len(widths))] for group in members]
        sizes = [sum(numel[p] for p in group) for group in members]
        for group, c in zip(members, _cheapest(together, sizes, widths, size - spent), strict=True):
            bits |= dict.fromkeys(group, widths[c])
    return _allocation(sensitivity, [bits[p] for p in range(len(names))])


def _fixed(names: Sequence[str], fixed: Mapping[str, int], widths: Sequence[int]) -> dict[int, int]:
    """Row -> its bits, for rows whose bits are given."""
    stays: dict[int, int] = {}
    for pattern, bits in fixed.items():
        if isinstance(bits, bool) or bits not in (*widths, *NOT_ROUNDED):
            raise ArgumentError(
                f"fixed[{pattern!r}] must be one of the sensitivity's {', '.join(map(str, widths))} bits, or 16, 32 or 64 for "
                f"what is not rounded, not {bits!r}"
            )
        found = [p for p, name in enumerate(names) if fnmatchcase(name, str(pattern))]
        if not found:
            raise ArgumentError(f"fixed: no row of the sensitivity matches {pattern!r}")
        stays |= dict.fromkeys(found, int(bits))
    return stays


def _members(
    names: Sequence[str], groups: Callable[[str], object] | Iterable[Iterable[str]], stays: Mapping[int, int]
) -> list[list[int]]:
    """The rows that are not fixed, in groups that get the same number of bits."""
    labels: dict[int, object] = {}
    if callable(groups):
        labels = {p: label for p, name in enumerate(names) if (label := groups(name)) is not None}
    else:
        rows = {name: p for p, name in enumerate(names)}
        for number, group in enumerate(groups):
            for name in [group] if isinstance(group, str) else group:
                if name not in rows or rows[name] in labels:
                    problem = "is in two groups" if name in rows else "is no row of the sensitivity"
                    raise ArgumentError(f"groups: {name!r} {problem}")
                labels[rows[name]] = number
    found: dict[object, list[int]] = {}
    for p in range(len(names)):
        found.setdefault((True, labels[p]) if p in labels else (False, p), []).append(p)
    for members in found.values():
        if len({stays.get(p) for p in members}) > 1:
            one = next(names[p] for p in members if p in stays)
            raise ArgumentError(
                f"groups: {one} is fixed, and others of its group are not, or at other bits; fix the whole group, or take it out"
            )
    return [members for members in found.values() if members[0] not in stays]


@called_as(
    "uniform_bits(sensitivity, bits), where sensitivity is what quantization_sensitivity(model, report) returned"
)
def uniform_bits(sensitivity: pd.DataFrame, bits: int) -> pd.DataFrame:
    """The same number of bits everywhere, as a table like that of :func:`allocate_bits`, to compare with.

    Raises:
        ArgumentError: if the sensitivity has no such column.
    """
    sensitivity = _by_parameter(sensitivity)
    if checked_bits(bits) not in _choices(sensitivity)[2]:
        raise ArgumentError(f"the sensitivity has no column for {bits} bits; add it to bits=")
    return _allocation(sensitivity, [bits] * len(sensitivity))


def _by_parameter(sensitivity: pd.DataFrame) -> pd.DataFrame:
    """The table with its rows named by their parameters, also where a file has made the names a column."""
    return sensitivity.set_index("parameter") if "parameter" in getattr(sensitivity, "columns", ()) else sensitivity


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
    # That is the cost of a solution; no choice that costs more can be part of the best one.
    enough = sum(row[widths.index(everyone)] for row in costs)
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
    # The solver's tolerances must not exceed the budget, even by a bit.
    if sum(n * widths[c] for n, c in zip(numel, choice, strict=True)) > size:
        return _cheapest(costs, numel, widths, size - 1)
    return choice


def _allocation(sensitivity: pd.DataFrame, bits: list[int]) -> pd.DataFrame:
    costs, numel, widths = _choices(sensitivity)
    rows = [
        {"parameter": name, "numel": n, "bits": b, "predicted": row[widths.index(b)] if b in widths else 0.0}
        for name, n, b, row in zip(sensitivity.index, numel, bits, costs, strict=True)
    ]
    size = sum(n * b for n, b in zip(numel, bits, strict=True))
    total = sum(row["predicted"] for row in rows)
    facts: dict[str, Any] = {"size": size, "bits_per_weight": size / max(1, sum(numel)), "predicted": total}
    scheme = {key: sensitivity.attrs[key] for key in ("scheme", "per", "group_size") if key in sensitivity.attrs}
    if untouched := [str(row["parameter"]) for row in rows if row["bits"] not in widths]:
        facts["not_rounded"] = untouched
    return table(rows, "parameter", **facts, **scheme)
