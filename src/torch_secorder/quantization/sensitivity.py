"""The predicted cost of rounding each parameter and each output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from torch_secorder.arguments import Fisher, Grain, Scheme, WeightSelection, called_as, require_choice
from torch_secorder.autograd.double_precision import in_double_precision
from torch_secorder.curvature import Curvature, curvature, warn_if_no_prediction
from torch_secorder.errors import ArgumentError
from torch_secorder.model.parameters import named_modules, unwrapped
from torch_secorder.quantization.rounding import Rounding, RoundingFunction, checked_bits
from torch_secorder.results.results import Results, results_of
from torch_secorder.tables import table

if TYPE_CHECKING:
    import pandas as pd


@called_as(
    "quantization_sensitivity(model, monitor), where in place of the monitor there may be its results or a report of the model"
)
def quantization_sensitivity(
    model: nn.Module,
    source: Results | pd.DataFrame,
    bits: int | Sequence[int] = (2, 3, 4, 6, 8),
    scheme: Scheme = "symmetric",
    *,
    per: Grain = "channel",
    group_size: int | None = None,
    rounding: RoundingFunction | None = None,
    parameters: WeightSelection = "weights",
    activations: bool | pd.DataFrame = False,
    diagonal: Mapping[str, Tensor] | None = None,
    fisher: Fisher | None = None,
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
        model: the model that was analyzed.
        source: a monitor or :func:`~torch_secorder.fisher_results` (with ``diagonal=True`` for the first form), a report
            by parameter, or a report that was read from a file: see :func:`torch_secorder.tables.read_report`. It should
            be of the exact or the sampled Fisher.
        bits: the bit widths, each 1 to 16.
        scheme: "symmetric" or "affine".
        per: one step per "tensor", per output "channel" of a weight, or per "group" of ``group_size`` entries of a channel, as in
            :func:`rounded`. Outputs of modules have one step.
        group_size: the size of groups for ``per="group"``.
        rounding: a function from a weight and a number of bits to the rounded weight, such as that of another package, in place
            of :func:`rounded`. Outputs of modules are rounded by ``scheme``.
        parameters: "weights" for parameters with two or more axes, "all", or a function from a name to whether it counts.
        activations: also give the outputs of modules a row: True for all modules without children, from a monitor or
            results with ``activations=True``, or the rows of ``monitor.activations`` to take.
        diagonal: the Fisher diagonal that belongs to a report, in the report's scaling.
        fisher: which Fisher the source is of, if it does not say so itself. A monitor around backward passes for labels that
            were drawn from the model's prediction is best told so at the start: ``FisherMonitor(..., fisher="sampled")``.

    Returns:
        A DataFrame with index ``parameter`` (for outputs: the module), columns ``kind`` ("weight" or "activation"), ``numel``
        (for outputs: per sample), and one for each number of bits, an int. ``attrs`` hold ``scheme``, ``per``, ``fisher``,
        ``basis`` ("diagonal", "channels" if sums over channels were kept, or "trace") and ``unit``.

    Raises:
        ArgumentError: for bits outside 1..16, a report of another model or without the columns that it needs, activations
            that were not watched, or one symmetric bit for activations, whose error is not uniform noise.

    Warns:
        UserWarning: if the source is of the empirical or the observed Fisher, which predicts no KL divergence.

    Example:
        >>> import torch
        >>> from torch_secorder import fisher_report
        >>> from torch_secorder.quantization import quantization_sensitivity
        >>> layers = torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
        >>> model = torch.nn.Sequential(*layers)
        >>> data = torch.randn(32, 4), None
        >>> report = fisher_report(model, None, data, fisher="exact", progress=False)
        >>> sensitivity = quantization_sensitivity(model, report, bits=(4, 8))
        >>> list(sensitivity.columns), list(sensitivity.index)
        (['kind', 'numel', 4, 8], ['0.weight', '2.weight'])
        >>> bool((sensitivity[4] > sensitivity[8]).all())
        True

    Source:
        Zandonati et al. (2022), "FIT: a metric for model sensitivity"; LeCun et al. (1990), "Optimal brain damage".
    """
    widths = [checked_bits(b) for b in (bits if isinstance(bits, Iterable) else [bits])]
    if not widths or len(set(widths)) < len(widths):
        raise ArgumentError(f"bits must be one or more different numbers, not {tuple(widths)}")
    way = Rounding(scheme, per, group_size, rounding)
    known = curvature(model, source, fisher=fisher, diagonal=diagonal)
    warn_if_no_prediction(known.fisher)
    rows: list[dict[Any, Any]] = []
    for name in _chosen(known, parameters):
        weight, f = known.parameters[name], known.of(name)
        row: dict[Any, Any] = {"parameter": name, "kind": "weight", "numel": weight.numel()}
        for b in widths:
            error = in_double_precision(way.of(name, weight, b, known.axes[name])) - in_double_precision(weight)
            row[b] = 0.5 * float((in_double_precision(f) * error.square()).sum())
        rows.append(row)
    if activations is not False:
        rows += _activations(unwrapped(model), source, activations, known, widths, scheme)
    facts = {"fisher": known.fisher, "basis": known.basis, "unit": "nats per sample"}
    return table(rows, "parameter", ("kind", "numel", *widths), **way.facts, **facts)


def _chosen(known: Curvature, parameters: WeightSelection) -> list[str]:
    if callable(parameters):
        return [name for name in known.parameters if parameters(name)]
    require_choice("parameters", parameters, ("weights", "all"))
    return [name for name, p in known.parameters.items() if parameters == "all" or p.dim() > 1]


def _activations(
    model: nn.Module, source: Any, activations: Any, known: Curvature, widths: list[int], scheme: str
) -> list[dict[Any, Any]]:
    if activations is True:
        source = results_of(source)
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
