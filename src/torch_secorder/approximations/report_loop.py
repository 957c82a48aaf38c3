"""The loop over data: one batch after the other is analyzed, verified when that is due, and added to the results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_secorder.approximations.batches import LabeledBatch, Layout, batches, while_any
from torch_secorder.approximations.progress import Progress
from torch_secorder.approximations.report_options import ReportOptions
from torch_secorder.arguments import Loss, fresh_generator, require_model_before_loss
from torch_secorder.autograd.compiled import eager_code
from torch_secorder.autograd.random_state import forked_random
from torch_secorder.batch_axis.count import count_of
from torch_secorder.batch_axis.told import told
from torch_secorder.errors import ArgumentError
from torch_secorder.likelihoods import random_signs, require_loss_of
from torch_secorder.model.parameters import unwrapped
from torch_secorder.model.restore import keeping_graphs, lock_of
from torch_secorder.recording.quantities import SampleIds, SampleRows
from torch_secorder.recording.sample_norms import SampleNorms
from torch_secorder.results.results import Results
from torch_secorder.running.analysis import Analysis, Checked
from torch_secorder.running.analyzed import Batch
from torch_secorder.running.logits import logits
from torch_secorder.running.misplaced import explaining_misplaced
from torch_secorder.running.own_loss import loss_function
from torch_secorder.running.placing import Placing
from torch_secorder.verification.empirical import verify_empirical
from torch_secorder.verification.samples_alone import verify_samples
from torch_secorder.verification.schedule import analyze_and_verify


def accumulated(
    model: nn.Module,
    loss_fn: Loss | None,
    data: Any,
    options: ReportOptions,
    earlier: Results | None = None,
    progress: Progress | None = None,
) -> Iterator[Results]:
    """The results so far, the same object after every batch.

    Args:
        model: as for :func:`fisher_results`, like ``loss_fn`` and ``data``.
        loss_fn: see there.
        data: see there.
        options: the other arguments.
        earlier: results of other batches, to add these batches to.
        progress: shows how far it is, where the caller counts the batches; by default as the options say.
    """
    if options.fisher == "empirical":
        if loss_fn is None:
            raise ArgumentError(
                'fisher="empirical" needs a loss_fn; fisher="exact", of the model\'s own labels, needs none'
            )
        loss = loss_function(loss_fn)
    elif loss_fn is not None:
        require_loss_of(options.loss_type, loss_function(loss_fn))
    require_model_before_loss(model, loss_fn)
    kind, generator = options.kind, fresh_generator(options.generator)
    words = told(unwrapped(model), options.batch_axis, options.n_samples, options.sample_of)
    analysis = Analysis(
        *(model, options.parameters, words),
        keeps=options.keeps,
        max_memory=options.max_memory,
        checks=options.verify,
    )
    layout = Layout(analysis.model, options.labels, labels_go_in=loss_fn == "model", ids=options.ids)
    results, reduction, precision = earlier, options.reduction, options.precision
    placed = Placing(analysis.table.tensors, options.device)

    def left() -> int | None:
        """How many samples may still be counted; None for any number."""
        return None if options.max_samples is None else options.max_samples - (results.n_samples if results else 0)

    own = Progress(options.progress, options.fisher)
    progress = progress or own
    wanted = while_any(left, batches(data, options.max_batches, own))
    checked: Checked = "always" if options.verify else "never"
    with keeping_graphs(analysis.model):
        for loaded in _in_step(analysis, wanted):
            parts = layout.parts(loaded)
            most = left()
            parts = parts if most is None else parts.first(most, words)
            inputs, targets = placed(parts.inputs), placed(parts.targets)
            # Ranks that hold the model together have to run it together, and refuse an empty batch.
            if not analysis.table.ranks.distributed and count_of(words, inputs).n == 0:
                continue
            with lock_of(analysis.model), eager_code(), explaining_misplaced(inputs, targets):
                if options.fisher == "empirical":
                    batch = _empirical(analysis, loss, inputs, targets, checked)
                    samples, reduction = batch.samples, reduction or batch.reduction
                else:
                    analyze = partial(analysis.fisher, kind, inputs, targets, generator, progress.passes)
                    samples = _of_likelihood(analysis, analyze, inputs, checked, exact=options.fisher == "exact")
            checked = "when due" if options.verify else "never"
            _require_batch_of(parts, samples.batch, most)
            if parts.ids is not None:
                samples = replace(samples, parts=samples.parts | {SampleRows.name: SampleIds(parts.ids)})
            results = results or Results(analysis.table.rows, reduction or "mean", options.fisher, **analysis.keeps)
            results.statistics.update(samples)
            if precision is not None:
                results.precision = precision.facts(results.statistics)
            progress.show(results, "" if precision is None else precision.as_text(results.statistics))
            yield results
            # Ranks that hold the model together have samples of their own, and stop together.
            if precision is not None and not analysis.table.ranks.max_over_ranks(not results.precision["reached_rtol"]):
                return


def _require_batch_of(parts: LabeledBatch, n: int, most: int | None) -> None:
    """Raise unless a batch has an id for each of its samples, and no more samples than are left."""
    if parts.ids is not None and len(parts.ids) != n:
        raise ArgumentError(f"ids: {len(parts.ids)} of them for a batch of {n} samples; give one for each")
    if most is not None and n > most:
        raise ArgumentError(
            f"max_samples: a batch of {n} samples can't be cut to the {most} that are left, since its inputs have another number "
            "of indices on their batch axis: use max_batches= and batches that fit"
        )


def _empirical(
    analysis: Analysis, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any, checked: Checked
) -> Batch:
    """One batch's gradients of the loss, which are compared with those of single samples if a check is due."""
    analyze = partial(analysis.empirical, loss_fn, inputs, targets, checked=checked)
    return analyze_and_verify(analysis, analyze, partial(verify_empirical, analysis, loss_fn, inputs, targets))


def _of_likelihood(
    analysis: Analysis, analyze: Callable[[], SampleNorms], inputs: Any, checked: Checked, *, exact: bool
) -> SampleNorms:
    """One batch's gradients of a likelihood. If a check is due, random projections are compared with single samples'."""
    if checked == "always":
        _verify_projection(analysis, inputs, exact=exact)
    samples = analyze()
    due = checked != "never" and analysis.is_due(_projection)
    if due and checked == "when due" and not _verify_projection(analysis, inputs, exact=exact):
        return analyze()
    return samples


def _verify_projection(analysis: Analysis, inputs: Any, *, exact: bool) -> bool:
    """Raise unless the gradients of one random projection of the outputs are right.

    Every Fisher differentiates such projections, so that they stand for all of its backward passes; those of the exact one may
    begin before the last layer.

    Returns:
        Whether the gradients were right at once. If they were right only after the samples had been looked for again, the shapes
        had been misleading, and what was computed from them before has to be computed again.
    """
    trusted = analysis.trusts_shapes
    with forked_random(analysis.table.tensors):  # the check is one more forward
        analyze_and_verify(
            analysis,
            partial(analysis.of, _projection, inputs, by_last_layer=exact),
            partial(verify_samples, analysis, _projection, inputs),
        )
    return analysis.trusts_shapes == trusted


def _projection(outputs: Any) -> Tensor:
    """The sum of the outputs with random signs that are the same in each call."""
    f = logits(outputs)
    return (f * random_signs(f.shape, f, torch.Generator().manual_seed(0))).sum()


def _in_step(analysis: Analysis, batches: Iterable[Any]) -> Iterable[Any]:
    """The batches. All ranks that hold parts of the model take one at the same time, and raise if some have no more."""
    ranks, remedy = analysis.table.ranks, "some have more batches than others; give each as many, or pass max_batches="
    for batch in batches:
        ranks.require_same("a batch", remedy)
        yield batch
    ranks.require_same("the end", remedy)
