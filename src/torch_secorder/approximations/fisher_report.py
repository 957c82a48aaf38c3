"""fisher_report: the whole loop over data in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torch_secorder.approximations.report_arguments import ReportArguments
from torch_secorder.approximations.report_loop import accumulated
from torch_secorder.approximations.report_options import ReportOptions
from torch_secorder.arguments import (
    By,
    DiagonalLayout,
    ErrorOf,
    Fisher,
    Loss,
    LossType,
    Reduction,
    called_as,
)
from torch_secorder.batch_axis.told import BatchAxis, NSamples, SampleOf
from torch_secorder.errors import ArgumentError
from torch_secorder.model.selection import Selection
from torch_secorder.results.results import Results
from torch_secorder.running.placing import Device

if TYPE_CHECKING:
    import pandas as pd
    from typing_extensions import Unpack

USAGE = "(model, loss_fn, data), where data is a loader or one pair (inputs, targets), and all other arguments by name"


@called_as(
    f"fisher_report{USAGE}",
    diagonal="use fisher_results, which keeps more than the table",
    per_sample="use fisher_results, which keeps more than the table",
)
def fisher_report(
    model: nn.Module,
    loss_fn: Loss | None,
    data: Any,
    *,
    fisher: Fisher = "empirical",
    num_samples: int | None = None,
    loss_type: LossType = "nll",
    max_batches: int | None = None,
    max_samples: int | None = None,
    rtol: float | None = None,
    rtol_of: ErrorOf = "total",
    progress: bool = True,
    verify: bool = True,
    by: By = None,
    reduction: Reduction | None = None,
    parameters: Selection = "trainable",
    labels: str | None = None,
    batch_axis: BatchAxis = None,
    n_samples: NSamples = None,
    sample_of: SampleOf = None,
    ignore_index: int = -100,
    class_axis: int = 1,
    shift: bool = False,
    generator: torch.Generator | None = None,
    max_passes: int = 10_000,
    max_memory: int | None = None,
    device: Device = None,
) -> pd.DataFrame:
    """The table of every parameter's Fisher-trace contribution over a data set. Runs the loop itself, writes no ``.grad``.

    Args:
        model: the model; it runs in its current mode.
        loss_fn: from ``(outputs, targets)`` to a scalar; "model" for the loss that the model computes itself
            (``outputs.loss``); may be None unless ``fisher="empirical"``.
        data: an iterable of batches, a DataLoader say, or one batch. A batch is ``(inputs, targets)``, and what follows these
            two is not used; inputs may be a tensor, a tuple of positional arguments or a mapping of keyword arguments. Or it is
            a mapping, which goes into the model by keywords and to the loss as it is, ``loss_fn(outputs, batch)``. A tuple of
            two mappings is ``(inputs, targets)``, a list of mappings is several batches. Batches without samples are passed over.
        fisher: "empirical" for gradients of the loss; "exact" for the average over the labels that the model
            predicts; "sampled" for an unbiased estimate of it; "observed" for gradients of log p(target).
        num_samples: how many backward passes per batch "sampled" takes, 1 by default.
        loss_type: the likelihood, for everything but "empirical"; see
            :func:`~torch_secorder.approximations.fisher_trace.generalized_fisher_trace`.
        max_batches: use at most this many batches.
        max_samples: use at most this many samples; of the last batch only the first ones are taken.
        rtol: stop as soon as the standard error is no more than this fraction of the trace, such as 0.05, and at least 32
            samples were seen. The data have to come in a random order. ``attrs`` then say ``rtol``, ``rtol_of``, the
            ``relative_stderr`` that there is, and whether it ``reached_rtol`` or the data ended before. With fewer than 32
            samples it is not reached, however small the error, since a standard error of so few is a guess itself.
        rtol_of: whose standard error: that of the "total", or of all "rows", each of its own trace.
        progress: show on a terminal, or in a notebook, how far the loop is and the total so far, with tqdm if it is installed.
        verify: check the first, the last and a random sample of the first batch against plain autograd, and of later ones that
            make another kind of graph, or the 2nd, 3rd, 5th, 9th, ... of a kind.
        by: as in :meth:`FisherMonitor.report`.
        reduction: "mean" or "sum"; by default as the loss does ("empirical"), else "mean".
        parameters: as in :class:`FisherMonitor`; frozen ones require a gradient for the time, and all that aren't analyzed don't.
        labels: where batches are mappings, the entry that has the targets: the loss gets ``(outputs, targets)`` then, and the
            model gets all other entries, or with ``loss_fn="model"`` all.
        batch_axis: as in :class:`FisherMonitor`, and "targets" for what the loss takes.
        n_samples: as in :class:`FisherMonitor`.
        sample_of: as in :class:`FisherMonitor`.
        ignore_index: "nll" positions with this target contribute nothing. Where batches are mappings without ``labels=``, the
            targets are their ``labels``, or else positions that their ``attention_mask`` hides contribute nothing.
        class_axis: where "nll" outputs have their classes, with the samples on axis 0. Logits of three axes need -1 or -2, unless
            targets tell.
        shift: "nll" outputs at one position are about the label at the next, as those of causal language models are. Targets are
            the labels, not shifted; of a batch that is a mapping the ``labels``, or else the ``input_ids`` that its
            ``attention_mask`` lets through. For ``fisher="empirical"`` see :func:`torch_secorder.losses.causal_lm`.
        generator: for "sampled".
        max_passes: the most backward passes per batch that "exact" may take.
        max_memory: as in :class:`FisherMonitor`.
        device: where batches are brought to; by default, batches on the host come to the accelerator that all of the model is
            on. Inputs, and targets, of which something is there already are left as they are.

    Returns:
        The same table as :meth:`FisherMonitor.report`; ``grad_sq_norm`` is NaN, since no parameter gradient is computed. For
        the diagonal, per-sample squared norms and activation statistics, see :func:`fisher_results`.

    Raises:
        ArgumentError: for an invalid argument, no data, or a loss that neither averages nor sums.
        VerificationError: if a sample alone has other gradients than in its batch, or the loss compares samples.
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
    return fisher_results(
        model,
        loss_fn,
        data,
        fisher=fisher,
        num_samples=num_samples,
        loss_type=loss_type,
        max_batches=max_batches,
        max_samples=max_samples,
        rtol=rtol,
        rtol_of=rtol_of,
        progress=progress,
        verify=verify,
        reduction=reduction,
        parameters=parameters,
        labels=labels,
        batch_axis=batch_axis,
        n_samples=n_samples,
        sample_of=sample_of,
        ignore_index=ignore_index,
        class_axis=class_axis,
        shift=shift,
        generator=generator,
        max_passes=max_passes,
        max_memory=max_memory,
        device=device,
    ).report(by)


@called_as(
    f"fisher_results{USAGE}",
    ReportArguments.__annotations__,
    by="group its table, fisher_results(model, loss_fn, data).report(by=...)",
)
def fisher_results(
    model: nn.Module,
    loss_fn: Loss | None,
    data: Any,
    *,
    diagonal: DiagonalLayout = False,
    per_sample: bool = False,
    activations: bool = False,
    ids: str | int | Callable[[Any], Any] | None = None,
    **options: Unpack[ReportArguments],
) -> Results:
    """The results behind the table of :func:`fisher_report`, with the diagonal, per-sample squared norms and activations.

    Args:
        model: as for :func:`fisher_report`, like ``loss_fn`` and ``data``.
        loss_fn: see there.
        data: see there.
        diagonal: also keep the Fisher diagonal, a tensor of each parameter's size, or the sums that a mapping from patterns of
            names to "full", "rows" or "columns" asks for; see :class:`FisherMonitor`.
        per_sample: also keep every sample's squared norms; under "exact" their expectations.
        activations: also keep the Fisher trace and the moments of every module's output. Sums of one's own are for a
            loop of one's own: ``FisherMonitor(on_output=)``, since under "exact" a sample has many gradients with weights, of
            which no single one is the one that a function should see.
        ids: what the rows of ``per_sample`` are called: the entry of batches that are mappings, which the model is not given;
            the place in batches that are sequences, 2 for what follows inputs and targets; or a function of a batch. Ids are a
            list of names or numbers, or a tensor of integers.
        options: the other arguments of :func:`fisher_report`, without ``by``.

    Returns:
        Results like those of a :class:`FisherMonitor`: ``report(by)``, ``trace``, ``diagonal``, ``per_sample``, ``activations``,
        ``merge``, ``save``.

    Raises:
        CurvatureError: as :func:`fisher_report`.

    Example:
        >>> import torch
        >>> from torch_secorder import fisher_results
        >>> model = torch.nn.Linear(3, 2)
        >>> options = {"fisher": "exact", "diagonal": True, "progress": False}
        >>> results = fisher_results(model, None, (torch.randn(8, 3), None), **options)
        >>> results.diagonal["weight"].shape, results.report().attrs["fisher"]
        (torch.Size([2, 3]), 'exact')
    """
    keeps = {"diagonal": diagonal, "per_sample": per_sample, "activations": activations}
    if ids is not None and not per_sample:
        raise ArgumentError("ids name the rows of per_sample: pass per_sample=True, too")
    results = None
    for results in accumulated(model, loss_fn, data, ReportOptions(keeps=keeps, ids=ids, **options)):  # noqa: B007  # The last one is returned.
        pass
    if results is None:
        raise ArgumentError(
            "data has no batch with samples; a generator, zip or iterator that was used before has none left: make it anew, or "
            "pass a list or a loader"
        )
    return results
