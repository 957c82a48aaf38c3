"""Losses that a model computes itself: whether they average or sum shows when the model runs on some rows again."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_secorder.arguments import Reduction, require_loss
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.batch_axis.samples import BatchSamples
from torch_secorder.errors import ArgumentError
from torch_secorder.model.containers import tensors
from torch_secorder.model.ranks import Ranks
from torch_secorder.running.loss_calls import loss_value
from torch_secorder.running.trials import (
    NEAR,
    NEAR_IN_HALF_PRECISION,
    LossFunction,
    multiple_of,
    reduction_of_multiples,
)


def own_loss(outputs: Any, targets: Any) -> Tensor:
    """The loss that is among a model's outputs; targets are not used, since the model had them.

    Raises:
        ArgumentError: if there is none.
    """
    found = outputs.get("loss") if hasattr(outputs, "get") else getattr(outputs, "loss", None)
    if found is None and isinstance(outputs, (tuple, list)) and outputs and _is_number(outputs[0]):
        found = outputs[0]
    if found is None:
        raise ArgumentError(
            f'loss_fn="model": the model returned a {type(outputs).__name__} without a loss. It has to be given its targets: let '
            "batches be mappings that have them under the name that its forward takes, such as labels"
        )
    return found


def loss_function(loss_fn: Any) -> LossFunction:
    """The function that an argument ``loss_fn`` stands for.

    Raises:
        ArgumentError: if it is neither "model" nor something to call.
    """
    if isinstance(loss_fn, str) and loss_fn == "model":
        return own_loss
    require_loss(loss_fn, ', or "model" for the loss that the model computes itself')
    return loss_fn


def is_computed_inside(loss_fn: LossFunction, outputs: Any, targets: Any, where: BatchSamples) -> bool:
    """Whether a loss depends on single numbers that the model computed from several samples.

    Such outputs have no row for each sample, so giving them to the loss twice shows nothing about how it combines samples.
    """
    if loss_fn is own_loss:
        return True
    if not any(x.numel() == 1 and x.requires_grad for x in tensors(outputs)):
        return False
    leaves: list[Tensor] = []

    def leaf(x: Tensor, placement: Placement | None) -> Tensor:
        if placement is not None or x.numel() != 1 or not x.requires_grad:
            return x.detach()
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    with torch.enable_grad():
        own = where.mapped(leaf, "outputs", outputs)
        loss = loss_value(loss_fn, own, targets) if leaves else torch.zeros((), device="cpu")
        found = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else ()
    return any(gradient is not None for gradient in found)


def own_reduction(
    of_samples: Callable[[list[int]], Tensor], n: int, ranks: Ranks, *, rounded: bool, finite: bool
) -> Reduction:
    """Whether the loss averages or sums over the batch, determined by running the model on rows [0] and [0, 0].

    If the loss of the first sample shows nothing (zero, or NaN because its labels are ignored), all samples are taken.

    Args:
        of_samples: from the numbers of some samples, possibly repeated, to their loss.
        n: the number of samples in the batch.
        ranks: the ranks that hold the model together, and run it together.
        rounded: whether products have few bits: in half precision, or with TF32.
        finite: whether the loss of the whole batch is finite.

    Raises:
        ArgumentError: if twice the samples give neither the loss nor twice the loss.
    """
    near = NEAR_IN_HALF_PRECISION if rounded else NEAR
    multiples = []
    for index in ([0], list(range(n))):
        once, twice = (_number(of_samples, samples) for samples in (index, index * 2))
        multiples.append(multiple_of(twice, once))
        found = reduction_of_multiples(multiples[-1], math.nan, near)
        if not ranks.max_over_ranks(found is None) and found is not None:
            return found
    if not finite:
        return "mean"  # The batch is going to be refused with the names of the parameters that are hit.
    raise ArgumentError(
        "the loss that the model computes neither averages nor sums over the batch: run on every sample twice it is "
        f"{' / '.join(f'{multiple:.6g}' for multiple in multiples)} times as large, not 1 or 2 times (a loss that compares "
        "samples with each other has no per-sample gradients)"
    )


def _number(of_samples: Callable[[list[int]], Tensor], samples: list[int]) -> float:
    try:
        return float(of_samples(samples))
    except Exception as error:
        raise ArgumentError(
            "the loss that the model computes can't be told to average or to sum, since the model does not run on "
            f"{len(samples)} of the batch's samples ({str(error)[:200]}): let it return what the loss is computed from, and pass "
            "a loss_fn of (outputs, targets)"
        ) from error


def _is_number(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 0 and x.is_floating_point()
