"""Whether a loss is separable by samples; otherwise there are no per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations, count, product
from math import comb
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from torch_secorder.batch_axis.placement import Placement
from torch_secorder.batch_axis.samples import BatchSamples, rows_of
from torch_secorder.errors import VerificationError
from torch_secorder.model.containers import evenly_spaced, is_continuous, shrunk, tensors
from torch_secorder.running.loss_calls import loss_value
from torch_secorder.verification.followed_loss import keeps_samples_apart
from torch_secorder.verification.selections import coupling_loss, selects_among_samples
from torch_secorder.verification.tolerances import ROUNDED_GRADIENT, SEPARABLE_LOSS

# A loss of more outputs than this is tried on a few samples only. For a smaller one, this bounds the number of trials.
CHEAP = 2**22
# Factors for the outputs of some samples: the first does not overflow in exponentials, the second makes outliers.
FAR = (30.0, -1e3)
FEW = 3  # enough for a loss that compares each sample with two others


def require_separable(loss_fn: Callable[[Any, Any], Tensor], outputs: Any, targets: Any, where: BatchSamples) -> None:
    """Raise if the loss's gradient in some samples' outputs depends on other samples' outputs.

    A loss that consists of functions which are known to keep samples apart is not tried. Of any other one, the outputs of half of
    the samples are changed, and the gradients in the outputs of the other half must stay the same. If that is cheap, there are
    so many halves that of any two samples each is changed at least once while the other is not. The outputs are also changed
    by large factors: a mask of the losses above the mean, or which of two losses is larger, may not change with small ones.

    Raises:
        VerificationError: if it does.
    """
    size, n = sum(x.numel() for x in tensors(outputs)), where.n
    if n < 2:
        return
    if size > CHEAP and n > FEW:
        few = [0, n // 2, n - 1]
        outputs, targets = where.rows("outputs", outputs, few), where.rows("targets", targets, few)
        where, n = where.subset(few), FEW
        size = sum(x.numel() for x in tensors(outputs))
    if keeps_samples_apart(loss_fn, outputs, targets, where):
        return
    before = _gradients(loss_fn, outputs, targets, where, look_for_selections=True)
    halves = _halves(n)[: max(2, CHEAP // max(size, 1))]
    for changed in halves:
        _require_same(before, _gradients(loss_fn, _changed(outputs, changed, where), targets, where), ~changed)
    for factor, changed in product(FAR, halves):
        after = _far_gradients(loss_fn, outputs, targets, where, changed, factor)
        if after is not None and len(after) == len(before):
            _require_same(before, after, ~changed)


def _far_gradients(
    loss_fn: Callable[[Any, Any], Tensor],
    outputs: Any,
    targets: Any,
    where: BatchSamples,
    changed: Tensor,
    factor: float,
) -> list[Tensor] | None:
    """The gradients with some samples' outputs far from all others, so that a choice by means or ranks changes.

    The result is None if the loss does not take such outputs.
    """
    try:
        found = _gradients(loss_fn, _changed(outputs, changed, where, partial(_far, factor=factor)), targets, where)
    except Exception:
        return None
    return found if all(bool(g.isfinite().all()) for g in found) else None


def _require_same(before: Sequence[Tensor], after: Sequence[Tensor], samples: Tensor) -> None:
    """Raise unless these samples' gradients are the same; gradients that are not finite count as different."""
    for here, there in zip(before, after, strict=True):
        ours, theirs = (of_samples[samples.to(of_samples.device)] for of_samples in (here, there))
        if torch.equal(ours, theirs) and bool(ours.isfinite().all()):
            continue
        own, theirs = _in_float64(ours), _in_float64(theirs)
        size, off = own.norm(dim=1), (own - theirs).norm(dim=1)
        if not bool((size.isfinite() & (off <= SEPARABLE_LOSS * (size + ROUNDED_GRADIENT * size.max()))).all()):
            raise coupling_loss()


def _halves(n: int) -> list[Tensor]:
    """Masks ``[n]`` of the samples to change, half of them each; of any two samples each is changed once without the other.

    Every sample is changed in another choice of the masks, of half as many as there are: then no choice is a part of another.
    """
    many = next(many for many in count(2) if comb(many, many // 2) >= n)
    choices = list(combinations(range(many), many // 2))
    order = torch.randperm(len(choices), generator=torch.Generator().manual_seed(n), device="cpu").tolist()
    changed = torch.zeros(many, n, dtype=torch.bool, device="cpu")
    for sample in range(n):
        changed[list(choices[order[sample]]), sample] = True
    return list(changed)


def _far(x: Tensor, factor: float) -> Tensor:
    """Numbers of another size, even if all given ones are zero."""
    return factor * (x + evenly_spaced(x, -1.0, 1.0))


def _changed(outputs: Any, which: Tensor, where: BatchSamples, other: Callable[[Tensor], Tensor] = shrunk) -> Any:
    """The outputs with other values for some samples."""

    def change(x: Tensor, placement: Placement | None) -> Tensor:
        if placement is None or not is_continuous(x):
            return x
        if x.is_nested:
            parts = zip(x.unbind(), other(x).unbind(), which.tolist(), strict=True)
            return torch.nested.as_nested_tensor(
                [theirs if change else own for own, theirs, change in parts], layout=x.layout
            )
        # Rows of other samples are values of the same kind, but rank differently.
        return torch.where(rows_of(which, x, placement), other(x.roll(1, placement.axis) if x.dim() else x), x)

    return where.mapped(change, "outputs", outputs)


def _gradients(
    loss_fn: Callable[[Any, Any], Tensor],
    outputs: Any,
    targets: Any,
    where: BatchSamples,
    *,
    look_for_selections: bool = False,
) -> list[Tensor]:
    """The loss's gradients in the outputs, ``[n, entries]`` each."""
    leaves: list[tuple[Tensor, Placement]] = []

    def leaf(x: Tensor, placement: Placement | None) -> Tensor:
        if placement is None or not is_continuous(x):
            return x
        x = x.detach().clone().requires_grad_()
        leaves.append((x, placement))
        return x

    with torch.enable_grad():
        loss = loss_value(loss_fn, where.mapped(leaf, "outputs", outputs), targets)
        if not leaves or not loss.requires_grad:
            raise VerificationError(
                f"the numbers can't be checked, since the loss has no gradient in any output with one row for each of {where.n} "
                "samples, as where a loss is computed inside the model: compute it in loss_fn from the model's other outputs "
                "(its logits), have the model return unreduced losses of shape (N,) or what the loss is computed from, or say "
                "where the outputs have them, as in batch_axis={'outputs': {1: 'list'}} for a list with an item for each sample; "
                "verify=False returns the numbers unchecked"
            )
        placements = [placement for _, placement in leaves]
        if look_for_selections and selects_among_samples(loss, [x for x, _ in leaves], where.n, placements):
            raise coupling_loss()
        found = torch.autograd.grad(loss, [x for x, _ in leaves], allow_unused=True)
    return [_rows(g, placement, where.n) for g, (_, placement) in zip(found, leaves, strict=True) if g is not None]


def _rows(grad: Tensor, placement: Placement, n: int) -> Tensor:
    """A row for each sample, of real numbers; the rows of a nested gradient are padded with zeros."""
    if grad.is_nested:
        return pad_sequence([_real(part).flatten() for part in grad.unbind()], batch_first=True)
    moved = _real(grad.movedim(placement.axis, 0) if grad.dim() else grad[None])
    groups = placement.grouping(n, moved.device)
    return (moved if groups is None else groups.rows(moved)).reshape(n, -1)


def _real(grad: Tensor) -> Tensor:
    """A gradient as real numbers."""
    return torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad


def _in_float64(grad: Tensor) -> Tensor:
    """A gradient in double precision, on the host."""
    return grad.cpu().double()
