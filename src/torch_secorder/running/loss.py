"""The user's loss: that it is a scalar, how it combines samples, and that it takes them apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_secorder.errors import ArgumentError, ShapeError, VerificationError
from torch_secorder.model.containers import mapped, rows, sample_axis, shrunk, tensors


def reduction_of(
    loss_fn: Callable[[Any, Any], Tensor],
    outputs: Any,
    targets: Any,
    loss: Tensor,
    n: int,
    axis: int = 0,
    expected: str | None = None,
) -> str:
    """Whether a loss averages or sums over the batch, found out by giving it samples twice.

    One sample twice is enough; where its loss says nothing (zero, or NaN because its target is ignored), the whole batch
    is taken, and after that the batch with other outputs. What was found out for this loss before, and is ``expected``, only has
    to hold for the loss of one sample.

    Raises:
        ArgumentError: if twice the samples give neither the loss nor twice the loss.
    """
    found: list[float] = []
    tolerance = 2e-2 if loss.dtype in (torch.float16, torch.bfloat16) else 1e-4
    with torch.no_grad(), torch.random.fork_rng(devices=[loss.device] if loss.is_cuda else []):
        if expected is not None:
            one = [rows(value, [0], n, axis) for value in (outputs, targets)]
            alone, again = _number(loss_fn, *one), _number(loss_fn, *(rows(value, [0, 0], 1, axis) for value in one))
            if abs(_ratio(again, alone) - {"mean": 1, "sum": 2}[expected]) < tolerance:
                return expected
        for size, index in ((1, [0]), (n, list(range(n)))):
            # Also for other outputs: the ratio of differences shows a constant that the loss itself may hide.
            single, double = [], []
            few = rows(outputs, index, n, axis)
            for out in (few, mapped(shrunk, few)):
                tgt = rows(targets, index, n, axis)
                single.append(_number(loss_fn, out, tgt))
                twice = [*range(size)] * 2
                double.append(_number(loss_fn, rows(out, twice, size, axis), rows(tgt, twice, size, axis)))
            ratio = _ratio(double[0], single[0])
            change = _ratio(double[0] - double[1], single[0] - single[1])
            for value, name in ((1.0, "mean"), (2.0, "sum")):
                agrees = math.isnan(change) or abs(change - value) < 0.1
                if (
                    abs((change if math.isnan(ratio) else ratio) - value) < (0.1 if math.isnan(ratio) else tolerance)
                    and agrees
                ):
                    return name
            found.append(ratio)
    if not bool(loss.isfinite()):
        return "mean"  # the gradients will say which parameters are hit
    raise ArgumentError(
        "the loss neither averages nor sums over the batch: given every sample twice it is "
        f"{' / '.join(f'{ratio:.6g}' for ratio in found)} times as large, not 1 or 2 times (a loss that compares samples "
        "with each other has no per-sample gradients)"
    )


def _number(loss_fn: Callable[[Any, Any], Tensor], outputs: Any, targets: Any) -> float:
    try:
        return float(loss_fn(outputs, targets))
    except Exception as error:
        raise ArgumentError(
            f"the loss can't be told to average or to sum, since it takes no other number of samples ({str(error)[:200]})"
        ) from error


def _ratio(a: float, b: float) -> float:
    return a / b if b and math.isfinite(b) else math.nan


def require_scalar_loss(loss: Any, n: int, targets: Any) -> Tensor:
    """The loss, if it is a scalar tensor."""
    if not isinstance(loss, Tensor):
        raise ArgumentError(f"the loss must be a scalar tensor, not {type(loss).__name__}")
    if loss.numel() != 1:
        raise ArgumentError(
            f'the loss must be a scalar, not of shape {tuple(loss.shape)}: average or sum it, e.g. reduction="mean"'
        )
    return loss


def require_targets_of_batch(targets: Any, n: int, axis: int = 0) -> None:
    """Raise if there is another number of targets than of samples."""
    if isinstance(targets, Tensor) and targets.dim() and sample_axis(targets, n, axis) is None:
        raise ShapeError(f"{n} samples in the inputs and {targets.shape[0]} in the targets")


def require_separable(loss_fn: Callable[[Any, Any], Tensor], outputs: Any, targets: Any, n: int, axis: int = 0) -> None:
    """Raise if the loss's gradient in one sample's outputs depends on other samples' outputs, tried on three samples."""
    few = min(n, 3)
    outputs, targets = (rows(value, list(range(few)), n, axis) for value in (outputs, targets))
    first = _gradients_in_first(loss_fn, outputs, outputs, targets, few, axis)
    second = _gradients_in_first(loss_fn, mapped(shrunk, outputs), outputs, targets, few, axis)
    for here, there in zip(first, second, strict=True):
        if (here - there).norm() > 1e-3 * here.norm():
            raise VerificationError(
                "the loss's gradient in the first sample's outputs changes with the other samples' outputs: a loss that "
                "compares samples with each other (contrastive, load balancing, batch statistics) has no per-sample gradients"
            )


def _gradients_in_first(
    loss_fn: Callable[[Any, Any], Tensor], rest: Any, outputs: Any, targets: Any, n: int, axis: int
) -> list[Tensor]:
    """The loss's gradient in the first sample of ``outputs``, with the other samples of ``rest``."""
    leaves: list[tuple[Tensor, int]] = []
    originals = iter(tensors(outputs))

    def leaf(x: Tensor) -> Tensor:
        original = next(originals)
        where = sample_axis(x, n, axis)
        if where is None or not x.is_floating_point():
            return original
        x = x.detach().clone()
        x.select(where, 0).copy_(original.select(where, 0))
        leaves.append((x.requires_grad_(), where))
        return x

    with torch.enable_grad():
        loss = loss_fn(mapped(leaf, rest), targets)
        found = torch.autograd.grad(loss, [x for x, _ in leaves], allow_unused=True)
    return [g.select(w, 0).double() for g, (_, w) in zip(found, leaves, strict=True) if g is not None]
