r"""What rounding costs, and who should get the bits.

Rounding a parameter w to ``w + delta`` changes the model's prediction. To second order, the Kullback-Leibler divergence from
the prediction of the model to that of the rounded one, per sample and in nats, is

.. math:: \mathrm{KL} \approx \tfrac12\, \delta^\top F\, \delta \approx \tfrac12 \sum_i F_{ii}\, \delta_i^2 ,

F being the Fisher of the model's own prediction, averaged over samples. ``delta`` is no guess: it is the real rounding error
of the weights at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch_secorder.errors import ArgumentError
from torch_secorder.parameters import named_modules, plain_name, unwrapped
from torch_secorder.results import Results, checked
from torch_secorder.sources import Curvature, channel_axis, curvature, warn_if_no_prediction
from torch_secorder.tables import table

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["allocate_bits", "quantization_sensitivity", "quantized", "rounded", "uniform_bits"]

SCHEMES, GRAINS = ("symmetric", "affine"), ("tensor", "channel")


def rounded(weight: Tensor, bits: int, scheme: str = "symmetric", per: str = "tensor", axis: int = 0) -> Tensor:
    r"""The weight after rounding to ``bits`` bits and back, in its own shape and dtype.

    With s the step, ``symmetric`` has the levels of a signed integer without its lowest, and ``affine`` those of an unsigned
    integer with a zero point z, so that 0 stays 0 in both:

    .. math::

       \hat w &= s\, \operatorname{round}(w / s), & s &= \max|w| / (2^{b-1} - 1) \\
       \hat w &= s\, (\operatorname{clamp}(\operatorname{round}(w / s) + z,\ 0,\ 2^b - 1) - z), &
       s &= (h - l) / (2^b - 1),\quad z = \operatorname{round}(-l / s)

    with :math:`l = \min(0, \min w)` and :math:`h = \max(0, \max w)`. One symmetric bit is the sign times the mean of
    ``|w|``, the nearest two levels of opposite sign. Halves go to the even integer, as in :func:`torch.round`.

    Args:
        weight: the tensor to round; it stays as it is.
        bits: 1 to 16.
        scheme: "symmetric" or "affine".
        per: one step for the "tensor", or one for each "channel". Tensors with fewer than two axes have one step anyway.
        axis: the axis of the channels.

    Raises:
        ArgumentError: for bits outside 1..16, an unknown scheme, or weights that are not finite.

    Example:
        >>> import torch
        >>> from torch_secorder.quantization import rounded
        >>> rounded(torch.tensor([-1.0, 0.2, 0.6, 0.9]), bits=2)
        tensor([-1.,  0.,  1.,  1.])

    Source:
        Jacob et al. (2018), "Quantization and training of neural networks for efficient integer-arithmetic-only inference";
        one bit: Rastegari et al. (2016), "XNOR-Net".
    """
    bits = checked_bits(bits)
    checked("scheme", scheme, SCHEMES)
    checked("per", per, GRAINS)
    if not weight.numel():
        return weight.clone()
    w = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if not bool(torch.isfinite(w).all()):
        raise ArgumentError("weights that are infinite or NaN can't be rounded")
    axes = [a for a in range(w.dim()) if per == "tensor" or w.dim() < 2 or a != axis % w.dim()]
    if scheme == "symmetric" and bits == 1:
        size = _over(axes, w.abs(), torch.mean)
        return torch.where(w < 0, -size, size).to(weight.dtype)
    if scheme == "symmetric":
        top = 2 ** (bits - 1) - 1
        step = _over(axes, w.abs(), torch.amax) / top
        low, zero = -top, torch.zeros_like(step)
    else:
        top, low = 2**bits - 1, 0
        bottom = _over(axes, w, torch.amin).clamp(max=0)
        step = (_over(axes, w, torch.amax).clamp(min=0) - bottom) / top
        zero = torch.where(step > 0, (-bottom / step).round(), 0.0)
    levels = ((w / step).round() + zero).clamp(low, top) - zero
    return torch.where(step > 0, levels * step, w).to(weight.dtype)


def quantization_sensitivity(
    model: nn.Module,
    source: Results | pd.DataFrame,
    bits: int | Sequence[int] = (2, 3, 4, 6, 8),
    scheme: str = "symmetric",
    *,
    per: str = "channel",
    parameters: str | Callable[[str], bool] = "weights",
    activations: bool | pd.DataFrame = False,
    diagonal: Mapping[str, Tensor] | None = None,
    fisher: str | None = None,
) -> pd.DataFrame:
    r"""The predicted KL divergence, in nats per sample, of rounding each parameter alone to each number of bits.

    .. math::

       \tfrac12 \sum_i F_{ii}\, \delta_i^2 \quad\text{where the diagonal is there, else}\quad
       \tfrac12\, \frac{\operatorname{tr} F_p}{d_p}\, \lVert \delta_p \rVert^2 ,

    with :math:`\delta` the error of :func:`rounded`, F averaged over samples whatever the report's reduction, and
    :math:`d_p` the number of the parameter's entries. For the output a of a module, rounding is noise of variance
    :math:`\Delta^2 / 12` with step :math:`\Delta` from the range that was seen, and the prediction is

    .. math:: \tfrac12 \cdot \tfrac{1}{12} \Delta^2 \cdot \mathbb{E}_n \lVert \nabla_a \ell_n \rVert^2 .

    Args:
        model: the model that was analysed.
        source: a monitor or :func:`~torch_secorder.fisher_results` (with ``diagonal=True`` for the first form), a report
            by parameter, or a report that was read from a file: see :func:`torch_secorder.tables.read_report`. It should
            be of the exact or the sampled Fisher.
        bits: the bit widths, each 1 to 16.
        scheme: "symmetric" or "affine".
        per: one step per "tensor" or per output "channel" of a weight. Outputs of modules have one step.
        parameters: "weights" for those with two or more axes, "all", or a function from a name to whether it counts.
        activations: also give the outputs of modules a row: True for all modules without children, from a monitor or
            results with ``activations=True``, or the rows of ``monitor.activations`` to take.
        diagonal: the Fisher diagonal that belongs to a report, in the report's scaling.
        fisher: which Fisher the source is of, if it doesn't say so itself. A monitor around backward passes of labels that
            were drawn from the model's prediction is best told at the start: ``FisherMonitor(..., fisher="sampled")``.

    Returns:
        A DataFrame with index ``parameter`` (for outputs: the module), columns ``kind`` ("weight" or "activation"), ``numel``
        (for outputs: per sample), and one for each number of bits, an int. ``attrs`` hold ``scheme``, ``per``, ``fisher``,
        ``basis`` ("diagonal" or "trace") and ``unit``.

    Raises:
        ArgumentError: for bits outside 1..16, a report of another model or without the columns that it needs, activations
            that were not watched, or one symmetric bit for activations, whose error is no uniform noise.

    Warns:
        UserWarning: if the source is of the empirical or the observed Fisher, which predicts no KL divergence.

    Example:
        >>> import torch
        >>> from torch_secorder import fisher_report
        >>> from torch_secorder.quantization import quantization_sensitivity
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> report = fisher_report(model, None, (torch.randn(32, 4), None), fisher="exact", progress=False)
        >>> sensitivity = quantization_sensitivity(model, report, bits=(4, 8))
        >>> list(sensitivity.columns), list(sensitivity.index)
        (['kind', 'numel', 4, 8], ['0.weight', '2.weight'])
        >>> bool((sensitivity[4] > sensitivity[8]).all())
        True

    Source:
        Zandonati et al. (2022), "FIT: a metric for model sensitivity"; LeCun et al. (1990), "Optimal brain damage".
    """
    widths = [checked_bits(b) for b in ([bits] if isinstance(bits, int) else bits)]
    if not widths or len(set(widths)) < len(widths):
        raise ArgumentError(f"bits must be one or more different numbers, not {tuple(widths)}")
    checked("scheme", scheme, SCHEMES)
    checked("per", per, GRAINS)
    known = curvature(model, source, fisher=fisher, diagonal=diagonal)
    warn_if_no_prediction(known.fisher)
    rows: list[dict[Any, Any]] = []
    for name in _chosen(known, parameters):
        weight, f = known.parameters[name], known.of(name)
        row: dict[Any, Any] = {"parameter": name, "kind": "weight", "numel": weight.numel()}
        for b in widths:
            error = rounded(weight, b, scheme, per, known.axes[name]).double() - weight.double()
            row[b] = 0.5 * float((f.double() * error.square()).sum())
        rows.append(row)
    if activations is not False:
        rows += _activations(unwrapped(model), source, activations, known, widths, scheme)
    basis = "diagonal" if known.diagonal else "trace"
    facts = {"scheme": scheme, "per": per, "fisher": known.fisher, "basis": basis, "unit": "nats per sample"}
    return table(rows, "parameter", ("kind", "numel", *widths), **facts)


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
        ImportError: without scipy: ``pip install torch-secorder[decide]``.

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
    checked("unit", unit, ("bits per weight", "bytes", "bits"))
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


@contextmanager
def quantized(
    model: nn.Module,
    bits: int | Mapping[str, int] | pd.DataFrame,
    scheme: str = "symmetric",
    per: str = "channel",
) -> Iterator[nn.Module]:
    """A context in which the model's weights are rounded; on leaving it, they are bit for bit what they were.

    Args:
        model: the model.
        bits: for all parameters with two or more axes, for those that a mapping names, or as :func:`allocate_bits` says.
        scheme: "symmetric" or "affine".
        per: "tensor" or "channel".

    Raises:
        ArgumentError: for bits outside 1..16, or names that the model lacks.

    Example:
        >>> import torch
        >>> from torch_secorder.quantization import quantized
        >>> model = torch.nn.Linear(4, 3)
        >>> with quantized(model, bits=2):
        ...     print(len(model.weight[0].unique()) <= 3)
        True
    """
    module = unwrapped(model)
    named = {plain_name(name): p for name, p in module.named_parameters()}
    if isinstance(bits, int):
        chosen = {name: bits for name, p in named.items() if p.dim() > 1}
    elif isinstance(bits, Mapping) or "bits" in getattr(bits, "columns", ()):
        chosen = {str(name): b for name, b in (bits if isinstance(bits, Mapping) else bits["bits"]).items()}
    else:
        raise ArgumentError(f"bits must be a number, a mapping, or what allocate_bits() returned, not {bits!r:.50}")
    if unknown := sorted(set(chosen) - set(named)):
        raise ArgumentError(f"{type(module).__name__} has no parameter {', '.join(unknown)}")
    owners = dict(named_modules(module))
    with torch.no_grad():
        new = {
            name: rounded(named[name], b, scheme, per, channel_axis(owners.get(name.rpartition(".")[0], module)))
            for name, b in chosen.items()
        }
        old = {name: named[name].clone() for name in chosen}
        try:
            for name, value in new.items():
                named[name].copy_(value)
            with torch.enable_grad():
                yield model
        finally:
            for name, value in old.items():
                named[name].copy_(value)


def checked_bits(bits: Any) -> int:
    """Bits that are an int from 1 to 16.

    Raises:
        ArgumentError: for anything else.
    """
    if isinstance(bits, bool) or not isinstance(bits, Integral) or not 1 <= int(bits) <= 16:
        raise ArgumentError(f"bits must be whole numbers from 1 to 16, not {bits!r}")
    return int(bits)


def _over(axes: list[int], w: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    return reduce(w, dim=axes, keepdim=True) if axes else w


def _chosen(known: Curvature, parameters: str | Callable[[str], bool]) -> list[str]:
    if callable(parameters):
        return [name for name in known.parameters if parameters(name)]
    checked("parameters", parameters, ("weights", "all"))
    return [name for name, p in known.parameters.items() if parameters == "all" or p.dim() > 1]


def _activations(
    model: nn.Module, source: Any, activations: Any, known: Curvature, widths: list[int], scheme: str
) -> list[dict[Any, Any]]:
    if activations is True:
        if not isinstance(source, Results):
            raise ArgumentError(
                "a report has no activations: pass activations=monitor.activations, or the monitor itself"
            )
        leaves = {name for name, module in named_modules(model) if not any(True for _ in module.children())}
        frame = source.activations
        frame = frame.loc[[name in leaves for name in frame.index]]
    else:
        frame = activations
    if missing := [c for c in ("activation_trace", "numel", "min", "max") if c not in getattr(frame, "columns", ())]:
        raise ArgumentError(f"activations lack {', '.join(missing)}; pass the rows of monitor.activations")
    if scheme == "symmetric" and 1 in widths:
        raise ArgumentError(
            'activations at 1 symmetric bit have no uniform rounding error: use scheme="affine" or more bits'
        )
    rows = []
    n, divisor = frame.attrs.get("n_samples", known.n_samples), known.divisor
    if "reduction" in frame.attrs:
        divisor = n if frame.attrs["reduction"] == "sum" else 1.0
    for name, row in frame.iterrows():
        low, high = min(0.0, float(row["min"])), max(0.0, float(row["max"]))
        trace = float(row["activation_trace"]) / divisor
        found: dict[Any, Any] = {
            "parameter": str(name),
            "kind": "activation",
            "numel": int(row["numel"]) // n,
        }
        for b in widths:
            step = max(-low, high) / (2 ** (b - 1) - 1) if scheme == "symmetric" else (high - low) / (2**b - 1)
            found[b] = 0.5 * trace * step**2 / 12
        rows.append(found)
    return rows


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
