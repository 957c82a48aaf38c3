"""The saliency of each weight, and the predicted cost of pruning a layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch_secorder.arguments import Fisher, WeightSelection, called_as, require_choice, require_share
from torch_secorder.autograd.double_precision import in_double_precision, on_host
from torch_secorder.curvature import curvature, warn_if_no_prediction
from torch_secorder.errors import ArgumentError, warn_at_users_line
from torch_secorder.results.results import Results, results_of
from torch_secorder.tables import table

if TYPE_CHECKING:
    import pandas as pd


@called_as(
    "weight_saliency(model, monitor), of a monitor with diagonal=True, or with its results or a report in the monitor's place"
)
def weight_saliency(
    model: nn.Module,
    source: Results | pd.DataFrame,
    *,
    parameters: WeightSelection = "weights",
    shrinkage: float = 0.0,
    diagonal: Mapping[str, Tensor] | None = None,
    fisher: Fisher | None = None,
) -> dict[str, Tensor]:
    r"""The predicted KL divergence, in nats per sample, of setting each single weight to zero.

    .. math:: s_i = \tfrac12 F_{ii} w_i^2

    with F averaged over samples whatever the report's reduction. If only the trace of a parameter is known, its mean
    :math:`\operatorname{tr} F_p / d_p` replaces every :math:`F_{ii}`: then magnitudes decide within a layer, and curvature
    decides between layers.

    Pruning by an estimated diagonal picks the entries that happen to be underestimated, above all those of channels that no
    sample activated. ``shrinkage`` :math:`\lambda` guards against that: it puts
    :math:`(1 - \lambda) F_{ii} + \lambda \operatorname{tr} F_p / d_p` in place of :math:`F_{ii}`. With few samples, any
    value above 0 is far better than 0. A safe middle value is 0.5, which is rarely the best: smaller ones are better on data like
    those of the Fisher, and larger ones on other data.

    Args:
        model: the model that was analyzed.
        source: a monitor or :func:`~torch_secorder.fisher_results` with ``diagonal=True``, or, for the second form, a
            report by parameter.
        parameters: "weights" for parameters with two or more axes, "all", or a function from a name to whether it counts.
        shrinkage: from 0, for the diagonal as it is, to 1, for its mean over each parameter.
        diagonal: the Fisher diagonal that belongs to a report, in the report's scaling.
        fisher: which Fisher the source is of, if it does not say so; see
            :func:`torch_secorder.quantization.quantization_sensitivity`.

    Returns:
        A dict from names to tensors of the parameters' shapes.

    Raises:
        ArgumentError: if the report is of another model or lacks columns, or for a shrinkage outside [0, 1].

    Warns:
        UserWarning: if the source is of the empirical or the observed Fisher (the order of weights may still be useful), or if it
            is a monitor or results without a diagonal.

    Example:
        >>> import torch
        >>> from torch_secorder import fisher_report
        >>> from torch_secorder.pruning import prune, weight_saliency
        >>> layers = torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
        >>> model = torch.nn.Sequential(*layers)
        >>> data = torch.randn(32, 4), None
        >>> report = fisher_report(model, None, data, fisher="exact", progress=False)
        >>> prune(model, weight_saliency(model, report), amount=0.5)
        >>> # of 32 and 24
        >>> sum(int((layer.weight == 0).sum()) for layer in (model[0], model[2]))
        28

    Source:
        LeCun, Denker and Solla (1990), "Optimal brain damage".
    """
    share = require_share(shrinkage, "shrinkage")
    known = curvature(model, source, fisher=fisher, diagonal=diagonal)
    warn_if_no_prediction(known.fisher)
    if known.basis == "trace" and share < 1 and isinstance(results_of(source), Results):
        warn_at_users_line(
            "the source keeps no diagonal, so that the mean of each parameter stands for all of its entries and weights within a "
            "parameter go by their size: pass diagonal=True to the monitor or to fisher_results, or shrinkage=1 if that is meant",
            UserWarning,
        )
    if not callable(parameters):
        require_choice("parameters", parameters, ("weights", "all"))
    return {
        name: (0.5 * _shrunk(in_double_precision(known.of(name)), share) * in_double_precision(weight).square()).to(
            weight.device, torch.promote_types(weight.dtype, torch.float32)
        )
        for name, weight in known.parameters.items()
        if (parameters(name) if callable(parameters) else parameters == "all" or weight.dim() > 1)
    }


@called_as("pruning_sensitivity(weight_saliency(model, monitor)), or of gates.saliency")
def pruning_sensitivity(
    saliency: Mapping[str, Tensor],
    amounts: float | Sequence[float] = (0.1, 0.3, 0.5),
    *,
    order: Mapping[str, Tensor] | None = None,
) -> pd.DataFrame:
    r"""The predicted KL divergence, in nats per sample, of pruning each parameter alone to each sparsity.

    It is the sum of the saliencies of the :math:`\operatorname{round}(a\, d_p)` pruned entries, of :math:`d_p` in all.

    Args:
        saliency: the result of :func:`weight_saliency` or :attr:`Gates.saliency`.
        amounts: the shares to prune, each from 0 to 1.
        order: other numbers to prune by, smallest first, such as the weights' absolute values; by default the saliency.

    Returns:
        A DataFrame with index ``parameter`` and columns ``numel`` and one for each amount.

    Raises:
        ArgumentError: for amounts outside [0, 1], a saliency with NaN, an order with other names or shapes, or a model in the
            saliency's place.

    Example:
        >>> import torch
        >>> from torch_secorder.pruning import pruning_sensitivity
        >>> saliency = {"weight": torch.tensor([[3.0, 1.0], [2.0, 4.0]])}
        >>> pruning_sensitivity(saliency, amounts=(0.25, 0.5)).loc["weight", 0.5]
        np.float64(3.0)
    """
    if not isinstance(saliency, Mapping) or not all(isinstance(scores, Tensor) for scores in saliency.values()):
        raise ArgumentError(
            f"pruning_sensitivity takes what weight_saliency() or Gates.saliency gave, not a {type(saliency).__name__}: "
            "pruning_sensitivity(weight_saliency(model, monitor))"
        )
    if bad := [name for name, scores in saliency.items() if bool(torch.isnan(scores).any())]:
        raise ArgumentError(f"the saliency of {bad[0]} has NaN")
    shares = [require_share(amount) for amount in (amounts if isinstance(amounts, Iterable) else [amounts])]
    rows: list[dict[Any, Any]] = []
    for name, scores in saliency.items():
        by = scores if order is None else order.get(name)
        if by is None or by.shape != scores.shape:
            raise ArgumentError(f"order must have a tensor of shape {tuple(scores.shape)} for {name}")
        sums = on_host(scores).flatten()[by.cpu().flatten().argsort()].cumsum(0)
        row: dict[Any, Any] = {"parameter": name, "numel": scores.numel()}
        for share in shares:
            count = round(share * scores.numel())
            row[share] = float(sums[count - 1]) if count else 0.0
        rows.append(row)
    return table(rows, "parameter", ("numel", *shares), unit="nats per sample")


def _shrunk(diagonal: Tensor, share: float) -> Tensor:
    return (1 - share) * diagonal + share * diagonal.mean() if share else diagonal
