"""Gradient noise scale: how large a batch has to be before its gradient is more signal than noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal

from torch_secorder.arguments import By, called_as, described
from torch_secorder.errors import ArgumentError

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("module", "module_type", "numel", "fisher_trace", "grad_sq_norm")


@called_as("gradient_noise_scale(monitor.report()), of a FisherMonitor's report by parameter")
def gradient_noise_scale(report: pd.DataFrame, by: By | Literal["model"] = "module") -> pd.DataFrame:
    r"""The simple noise scale of every module, or of other groups of parameters, from one report.

    With g the gradient of one sample's loss, :math:`G = \mathbb{E}\, g` and :math:`\Sigma = \operatorname{Cov}(g)`,

    .. math:: B_{\mathrm{simple}} = \frac{\operatorname{tr} \Sigma}{\lVert G \rVert^2}

    is the number of samples at which a batch's gradient has as much noise as signal: well below it, twice the batch
    halves the number of steps; well above it, twice the batch gains next to nothing. The expected squared norm of a
    batch of B samples' mean gradient is :math:`\lVert G \rVert^2 + \operatorname{tr} \Sigma / B`. A report has it for
    B = 1, :math:`S` = the mean over samples of :math:`\lVert g_n \rVert^2` (``fisher_trace`` under "mean"), and for
    the batches of the backward passes, :math:`Q` = ``grad_sq_norm``. With :math:`i` the mean over passes of
    :math:`1 / N_b`, which stands in ``report.attrs``, both parts are estimated without bias:

    .. math::

       \lVert G \rVert^2 \approx \frac{Q - i S}{1 - i}, \qquad \operatorname{tr} \Sigma \approx \frac{S - Q}{1 - i} .

    For one batch these are the mean of :math:`g_n \cdot g_m` over the pairs of different samples, and the sum of the
    entries' sample variances (ddof = 1). Their quotient is biased, as every quotient of estimates is, but the
    bias vanishes with more samples. The two parts add up over parameters; noise scales do not.

    Args:
        report: a table from :meth:`FisherMonitor.report() <torch_secorder.FisherMonitor.report>`, by parameter.
        by: "module", "type", "model" for one row in total, a function from a parameter's name to a group, or None for
            a row per parameter.

    Returns:
        A DataFrame with a row per group and the columns ``numel`` (of the parameters that have a gradient),
        ``true_grad_sq_norm`` (the estimate of :math:`\lVert G \rVert^2`, in squared units of the loss per unit of the
        parameter; sampling can make it negative), ``noise_trace`` (of :math:`\operatorname{tr} \Sigma`, in the same
        units), and ``noise_scale`` (in samples; NaN where the first is not positive: too few samples to tell). Rows of
        parameters without a gradient, such as frozen ones, are NaN.

    Raises:
        ArgumentError: if the report is grouped, lacks a column or its ``attrs``, holds no gradient of a batch
            (:func:`~torch_secorder.fisher_report` computes none), or only batches of one sample; or if its losses
            are sums over batches of different sizes, from which no scale can be computed.

    Example:
        >>> import torch
        >>> from torch_secorder import FisherMonitor
        >>> from torch_secorder.noise_scale import gradient_noise_scale
        >>> model = torch.nn.Linear(3, 2)
        >>> with FisherMonitor(model) as monitor:
        ...     for _ in range(4):
        ...         x, y = torch.randn(8, 3), torch.randint(2, (8,))
        ...         torch.nn.functional.cross_entropy(model(x), y).backward()
        >>> list(gradient_noise_scale(monitor.report(), by="model").columns)
        ['numel', 'true_grad_sq_norm', 'noise_trace', 'noise_scale']

    Source:
        McCandlish, Kaplan, Amodei and OpenAI Dota Team (2018), "An empirical model of large-batch training", section
        2.2 and appendix A.1.
    """
    if not isinstance(getattr(report, "columns", None), Iterable):
        raise ArgumentError(f"the report must be a table, as monitor.report() returns it, not {described(report)}")
    inverse = _mean_inverse_batch_size(report)
    known = report["grad_sq_norm"].notna()
    if not known.any():
        raise ArgumentError(
            "the report holds no gradient of a batch (grad_sq_norm is NaN throughout), without which noise cannot be told "
            "from signal: take a FisherMonitor's report, since fisher_report computes no parameter gradient"
        )
    if math.isnan(inverse):
        raise ArgumentError(
            "report.attrs has no mean_inverse_batch_size, the mean of 1 / N_b over the backward passes: pass what "
            "FisherMonitor.report() returned"
        )
    sums = report[["numel", "fisher_trace", "grad_sq_norm"]].where(known)
    if by is not None:
        sums = sums.groupby(_labels(report, by), sort=False).sum(min_count=1)
    single, batch = sums["fisher_trace"], sums["grad_sq_norm"]
    if report.attrs["reduction"] == "sum":  # gradients of sums over N / passes samples, and a sum over N samples
        single, batch = single / report.attrs["n_samples"], batch * inverse**2
    signal, noise = (batch - inverse * single) / (1 - inverse), (single - batch) / (1 - inverse)
    frame = sums[["numel"]].fillna(0).astype(int)
    return frame.assign(
        true_grad_sq_norm=signal, noise_trace=noise, noise_scale=noise / signal.where(signal > 0, math.nan)
    )


def _mean_inverse_batch_size(report: pd.DataFrame) -> float:
    """The mean over backward passes of 1 / N_b, if the report can be used at all."""
    if missing := [name for name in COLUMNS if name not in report]:
        raise ArgumentError(
            f"the report has no column {', '.join(missing)}: pass a FisherMonitor's report() by parameter, and say how to "
            'group it here (by="module")'
        )
    if missing := [name for name in ("reduction", "n_samples", "n_passes") if name not in report.attrs]:
        raise ArgumentError(
            f"report.attrs has no {', '.join(missing)}: pass what FisherMonitor.report() returned, since other tables "
            "(read from a file, joined, copied by hand) don't keep it"
        )
    n, passes = report.attrs["n_samples"], report.attrs["n_passes"]
    inverse = float(report.attrs.get("mean_inverse_batch_size", math.nan))
    if inverse == 1:
        raise ArgumentError(
            "every batch has one sample, whose gradient cannot tell noise from signal: take batches of two or more"
        )
    if report.attrs["reduction"] == "sum" and not math.isnan(inverse) and not math.isclose(inverse, passes / n):
        raise ArgumentError(
            f"the batches have different sizes ({n} samples in {passes} backward passes) and their losses are sums, so "
            'that squared gradients of different sizes were averaged: use a loss that averages and reduction="mean", or '
            "batches of one size (drop_last=True)"
        )
    return inverse


def _labels(report: pd.DataFrame, by: str | Callable[[str], object]) -> pd.Series[str]:
    if by in ("module", "type"):
        return report["module" if by == "module" else "module_type"].rename(by)
    if by == "model":
        return report["module"].map(lambda _: "model").rename("group")
    if callable(by):
        return report.index.to_series().map(by).rename("group")
    raise ArgumentError(
        f'by must be None, "module", "type", "model" or a function of a parameter\'s name, not {described(by)}'
    )
