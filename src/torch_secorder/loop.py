"""fisher_report: the whole loop over data in one call."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sized
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch_secorder.analysis import Analysis, Batch, FisherKind, a_function, fresh_generator, logits, positive_int
from torch_secorder.errors import ArgumentError
from torch_secorder.graph import one_at_a_time
from torch_secorder.likelihoods import random_signs
from torch_secorder.plan import BatchAxis
from torch_secorder.report import By, Report
from torch_secorder.results import checked
from torch_secorder.single import check_separable
from torch_secorder.statistics import Statistics
from torch_secorder.verification import trusted, verified

if TYPE_CHECKING:
    import pandas as pd


def fisher_report(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor] | None,
    data: Any,
    *,
    fisher: str = "empirical",
    num_samples: int | None = None,
    loss_type: str = "nll",
    max_batches: int | None = None,
    progress: bool = True,
    verify: bool = True,
    by: By = None,
    reduction: str | None = None,
    parameters: str = "trainable",
    batch_axis: BatchAxis = None,
    ignore_index: int = -100,
    class_axis: int = 1,
    generator: torch.Generator | None = None,
    max_passes: int = 10_000,
) -> pd.DataFrame:
    """The table of every parameter's Fisher-trace contribution over a data set. Runs the loop itself, writes no ``.grad``.

    Args:
        model: the model; it runs in its current mode.
        loss_fn: from ``(outputs, targets)`` to a scalar; may be None unless ``fisher="empirical"``.
        data: an iterable of ``(inputs, targets)``, a DataLoader say, or one such pair. Inputs may be a tensor, a tuple of
            positional arguments or a mapping of keyword arguments.
        fisher: "empirical" for gradients of the loss; "exact" for the Fisher with the model's own labels integrated out;
            "sampled" for an unbiased estimate of it; "observed" for gradients of log p(target).
        num_samples: how many backward passes per batch "sampled" takes, 1 by default.
        loss_type: the likelihood, for everything but "empirical"; see
            :func:`~torch_secorder.approximations.fisher_trace.generalized_fisher_trace`.
        max_batches: stop after so many.
        progress: show a progress bar, if tqdm is installed.
        verify: check one sample of the first batch against plain autograd.
        by: as in :meth:`FisherMonitor.report`.
        reduction: "mean" or "sum"; by default as the loss does ("empirical"), else "mean".
        parameters: "trainable" or "all".
        batch_axis: as in :class:`FisherMonitor`.
        ignore_index: "nll" positions with this target contribute nothing.
        class_axis: where "nll" outputs have their classes.
        generator: for "sampled".
        max_passes: the most backward passes per batch that "exact" may take.

    Returns:
        The same table as :meth:`FisherMonitor.report`; ``grad_sq_norm`` is NaN, since no parameter gradient is computed.

    Raises:
        ArgumentError: for arguments that mean nothing, no data, or a loss that neither averages nor sums.
        VerificationError: if one sample alone has other gradients than in its batch, or the loss compares samples.
        CurvatureError: in one of its kinds, for whatever can't be exact; it says what to do.

    Example:
        >>> import torch
        >>> from torch_secorder import fisher_report
        >>> model = torch.nn.Linear(3, 2)
        >>> data = [(torch.randn(8, 3), torch.randint(2, (8,))) for _ in range(4)]
        >>> report = fisher_report(model, torch.nn.CrossEntropyLoss(), data, progress=False)
        >>> report.attrs["n_samples"]
        32
    """
    checked("fisher", fisher, ("empirical", "exact", "sampled", "observed"))
    checked("reduction", reduction, (None, "mean", "sum"))
    if num_samples is not None and fisher != "sampled":
        raise ArgumentError(f'num_samples is for fisher="sampled", not fisher={fisher!r}')
    if fisher == "empirical":
        a_function("loss_fn", loss_fn)
    if max_batches is not None:
        positive_int("max_batches", max_batches)
    k = positive_int("num_samples", 1 if num_samples is None else num_samples)
    labels = "observed" if fisher == "observed" else "model"
    kind = FisherKind(loss_type, labels, k if fisher == "sampled" else None, ignore_index, class_axis, max_passes)
    generator = fresh_generator(generator)

    analysis = Analysis(model, parameters, batch_axis)
    statistics = Statistics(analysis.table.names, [row.shape for row in analysis.table.rows])
    for number, (inputs, targets) in enumerate(_batches(data, max_batches, progress)):
        with one_at_a_time(analysis.model):
            if fisher == "empirical":
                assert loss_fn is not None
                analyse = partial(analysis.empirical, loss_fn, inputs, targets)
                first = verify and number == 0
                batch = (
                    trusted(analysis, analyse, partial(_check, analysis, loss_fn, inputs, targets))
                    if first
                    else analyse()
                )
                samples, reduction = batch.samples, reduction or batch.reduction
            else:
                if verify and number == 0:
                    analyse = partial(analysis.of, _projection, inputs)
                    trusted(analysis, analyse, partial(verified, analysis, _projection, inputs))
                samples = analysis.fisher(kind, inputs, targets, generator)
        statistics.update(samples.norms, {}, samples.rules, samples.reached, {})
    if not statistics.n:
        raise ArgumentError("data has no batch")
    return Report(analysis.table.rows, statistics, reduction or "mean", fisher).table(by)


def _check(analysis: Analysis, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any, batch: Batch) -> None:
    scale = batch.samples.batch if batch.reduction == "mean" else 1
    check_separable(loss_fn, batch.outputs, targets, batch.samples.batch, analysis.batch_axis)
    verified(analysis, lambda outputs: loss_fn(outputs, targets) * scale, inputs, batch)


def _projection(outputs: Any) -> Tensor:
    """The outputs along one fixed random direction, which every Fisher's gradients are like."""
    f = logits(outputs)
    return (f * random_signs(f.shape, f, torch.Generator().manual_seed(0))).sum()


def _batches(data: Any, max_batches: int | None, progress: bool) -> Iterable[tuple[Any, Any]]:
    if _is_pair(data) and (isinstance(data, tuple) or not all(map(_is_pair, data))):
        data = [data]
    if not isinstance(data, Iterable):
        raise ArgumentError(f"data must be an iterable of pairs (inputs, targets), or one such pair, not {data!r}")
    total = len(data) if isinstance(data, Sized) else None
    if max_batches is not None:
        data, total = itertools.islice(data, max_batches), min(total or max_batches, max_batches)
    for batch in _with_progress(data, total) if progress else data:
        if not _is_pair(batch):
            raise ArgumentError(f"data must yield pairs (inputs, targets), not {type(batch).__name__}")
        yield tuple(batch)


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2


def _with_progress(data: Iterable[Any], total: int | None) -> Iterable[Any]:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return data
    return tqdm(data, total=total, desc="Fisher", unit="batch", leave=False)
