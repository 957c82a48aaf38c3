"""The user's loss: whether it is a scalar, and how it combines samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_secorder.arguments import Reduction
from torch_secorder.autograd.precision import has_half_precision, is_half
from torch_secorder.autograd.random_state import forked_random
from torch_secorder.batch_axis.samples import BatchSamples
from torch_secorder.errors import ArgumentError, ShapeError
from torch_secorder.model.containers import evenly_spaced, is_continuous, mapped, tensors
from torch_secorder.running.loss_calls import loss_value
from torch_secorder.running.trials import (
    MULTIPLES,
    NEAR,
    NEAR_IN_HALF_PRECISION,
    LossFunction,
    Trials,
    multiple_of,
)


def reduction_of(
    loss_fn: LossFunction,
    outputs: Any,
    targets: Any,
    loss: Tensor,
    where: BatchSamples,
    expected: Reduction | None = None,
) -> Reduction:
    """Whether a loss averages or sums over the batch, determined by giving it samples twice.

    There are two trials: the first sample twice, and the whole batch twice, or some samples of it where outputs are large. They
    must not contradict each other, as they do if a loss depends on the samples' places. Either may show nothing (zero, or NaN
    because its target is ignored). If both show nothing, as in a batch whose hinges are all satisfied, the loss is tried with
    other outputs, too. An answer that was found for this loss before, ``expected``, only has to hold for one sample, and also
    holds if nothing contradicts it.

    Raises:
        ArgumentError: if twice the samples give neither the loss nor twice the loss, or if no trial shows anything.
    """
    try:
        return _found_reduction(loss_fn, outputs, targets, loss, where, expected)
    except ArgumentError:
        if not where.is_one:
            raise
        return expected or "mean"  # A single sample without an axis can't be given twice.


def _found_reduction(
    loss_fn: LossFunction,
    outputs: Any,
    targets: Any,
    loss: Tensor,
    where: BatchSamples,
    expected: Reduction | None,
) -> Reduction:
    near = NEAR_IN_HALF_PRECISION if is_half(loss) else NEAR
    with torch.no_grad(), forked_random([loss]):
        if expected is not None:
            multiple = multiple_of(*Trials(loss_fn, targets, where, near).losses(outputs, [0]))
            if abs(multiple - MULTIPLES[expected]) < near:
                return expected
        _require_a_target_for_each_output(loss_fn, outputs, targets)
        _require_rows_of_lists(targets, where)
        if has_half_precision(loss, *tensors(outputs)):
            near = NEAR_IN_HALF_PRECISION
        trials = Trials.of(loss_fn, outputs, targets, loss, where, near)
        found = trials.multiples(outputs, [[0], trials.samples(outputs)])
        reductions = trials.reductions(found)
        if not reductions and expected is not None:
            return expected
        if not reductions and bool(loss.isfinite()):
            reductions = _reductions_of_own_numbers(trials, outputs)
    if len(reductions) == 1 and (reduction := reductions.pop()) is not None:
        return reduction
    if not bool(loss.isfinite()) and not _has_finite_gradient(loss_fn, outputs, targets):
        return "mean"  # The batch is going to be refused with the names of the parameters that are hit.
    if not reductions and bool(loss == 0):
        raise ArgumentError(
            "the loss is 0 for this batch, also with other outputs (is everything masked?), so that it doesn't show whether it "
            "averages or sums: let another batch come first, or leave this one out"
        )
    raise ArgumentError(
        "the loss neither averages nor sums over the batch: an average stays the same and a sum doubles where samples are given "
        f"twice, but this loss {_in_words(found[1][0])} for the whole batch and {_in_words(found[0][0])} for the first sample "
        "alone (a loss that compares samples with each other has no per-sample gradients); if an output has as many rows as "
        "there are samples and they are not theirs, as prototypes, return it once for each sample, as x.expand(n, ...) does"
    )


def _reductions_of_own_numbers(trials: Trials, outputs: Any) -> set[Reduction | None]:
    """The same for made-up outputs: probabilities, and numbers of both signs."""
    for low, high in ((0.25, 0.75), (-3.0, 3.0)):
        with suppress(ArgumentError):  # The loss takes no such numbers.
            own = mapped(partial(evenly_spaced, low=low, high=high), outputs)
            if reductions := trials.reductions(trials.multiples(own, [list(range(trials.where.n))])):
                return reductions
    return set()


def _require_a_target_for_each_output(loss_fn: LossFunction, outputs: Any, targets: Any) -> None:
    """Raise if outputs ``[n, 1]`` and targets ``[n]``, or the other way round, are broadcast to ``[n, n]``.

    Each output then meets every target.
    Such a loss stays the same when its targets change places, but not when their values change. Both are tried on made-up
    numbers, so that it does not matter what the model returned.
    """
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)) or targets.numel() < 2:
        return
    if not targets.is_floating_point() or outputs.squeeze(-1).shape != targets.squeeze(-1).shape:
        return
    if outputs.shape == targets.shape:
        return
    steps = torch.linspace(0.25, 0.75, targets.numel(), device=targets.device, dtype=targets.dtype).view(targets.shape)
    given = steps.to(outputs.device, outputs.dtype).view(outputs.shape)
    try:
        once, turned, moved = (float(loss_value(loss_fn, given, t)) for t in (steps, steps.roll(1, 0), steps + 0.125))
    except Exception:
        return  # The loss takes no such numbers.
    if abs(turned - once) <= NEAR * abs(once) and abs(moved - once) > NEAR * abs(once):
        shapes = f"outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(targets.shape)}"
        longer = targets.dim() > outputs.dim()
        fits = "targets.squeeze(-1)" if longer else "targets.unsqueeze(-1), or let the model return outputs.squeeze(-1)"
        raise ShapeError(
            f"the loss broadcasts {shapes}, so that every output is compared with every target: pass {fits}"
        )


def _require_rows_of_lists(targets: Any, where: BatchSamples) -> None:
    """Raise if targets are a list with as many items as samples that is not said to have one for each.

    It would not be doubled with the outputs, and a sum over its items would look like an average.
    """
    if type(targets) not in (list, tuple) or len(targets) != where.n or where.n < 2:
        return
    kinds = Mapping if isinstance(targets, tuple) else (Mapping, list, tuple, Tensor)
    counted = len(where.rows("targets", targets, [0])) != where.n or any(
        where.of(x, "targets") for x in tensors(targets)
    )
    if not counted and tensors(targets) and all(isinstance(item, kinds) for item in targets):
        raise ArgumentError(
            "the loss can't be told to average or to sum, since it takes no other number of samples: its targets are a list of "
            f"{where.n} items; let it get all that it has of each sample in tensors with a row for each sample, or, in a list "
            "with an item for each, say so by batch_axis={'targets': 'list'}"
        )


def _in_words(multiple: float) -> str:
    return "is zero or not finite" if math.isnan(multiple) else f"becomes {multiple:.6g} times as large"


def _has_finite_gradient(loss_fn: LossFunction, outputs: Any, targets: Any) -> bool:
    """Whether the loss's gradient in the outputs is finite, as it may be even if the loss overflows."""
    with torch.enable_grad():
        leaves = mapped(lambda x: x.detach().clone().requires_grad_(is_continuous(x)), outputs)
        wanted = [x for x in tensors(leaves) if x.requires_grad]
        loss = loss_value(loss_fn, leaves, targets)
        if not loss.requires_grad:
            return False
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    return all(bool(g.isfinite().all()) for g in gradients if g is not None)


def loss_of(loss_fn: LossFunction, outputs: Any, targets: Any) -> Tensor:
    """The batch's loss, if it is a scalar tensor.

    Raises:
        ArgumentError: if it is not, or if the loss cannot handle the outputs or targets that it gets.
    """
    try:
        loss = loss_value(loss_fn, outputs, targets)
    except (TypeError, AttributeError) as error:
        remedies = []
        if isinstance(targets, Mapping):
            remedies.append(
                f"the loss was given the whole batch, a mapping with {', '.join(map(str, targets))}, for its targets; "
                "labels= names the entry that has them"
            )
        if not isinstance(outputs, Tensor):
            remedies.append(
                f"the model returned a {type(outputs).__name__}; let the loss take what it needs out of that, as in "
                "lambda outputs, targets: cross_entropy(outputs.logits, targets)"
            )
        if not remedies:
            raise
        raise ArgumentError(
            f"the loss raised {type(error).__name__} ({str(error)[:200]}): {'; and '.join(remedies)}"
        ) from error
    return require_scalar_loss(loss)


def require_scalar_loss(loss: Any) -> Tensor:
    """The loss, if it is a scalar tensor."""
    if loss is None:
        raise ArgumentError(
            "the loss is None: the function that computes it returns nothing, or takes the loss that the model computes out of "
            "outputs that have none, since the model was not given its targets (batches that are mappings may have them)"
        )
    if not isinstance(loss, Tensor):
        raise ArgumentError(f"the loss must be a scalar tensor, not {type(loss).__name__}")
    if loss.numel() != 1:
        raise ArgumentError(
            f'the loss must be a scalar, not of shape {tuple(loss.shape)}: average or sum it, e.g. reduction="mean"'
        )
    return loss


def require_targets_of_batch(targets: Any, where: BatchSamples) -> None:
    """Raise if the number of targets differs from the number of samples."""
    if where.is_one:
        return
    counts = isinstance(targets, Tensor) and targets.dim() and where.words.axis("targets", 0) is not None
    if counts and where.of(targets, "targets") is None:
        raise ShapeError(f"{where.n} samples in the inputs and {targets.shape[0]} in the targets")
