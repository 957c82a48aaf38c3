"""The loop for losses that a model computes itself, for which no output has a row for each sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_secorder.errors import ArgumentError

# Some models compute their loss in float32 even if everything else is in float64 (transformers does), which loses its last bits.
# The gradients of two samples may be alike, but not so much that those bits decide how much each of them counts.
NEAR, ALIKE = 1e-5, 1e-2


def gradients_of_own_loss(
    loss_of: Callable[[list[int]], Tensor], n: int, named: Mapping[str, Tensor], reduction: str | None
) -> dict[str, Tensor]:
    """Every sample's gradient: parameter name -> ``[n, *shape]``.

    Each sample runs alone. An average over tokens weights a sample in its batch by its length. So the samples' weights are taken
    from the gradient of the batch's loss, which is a weighted sum of the single samples' gradients.

    Args:
        loss_of: from the numbers of some samples to their loss when they run together.
        n: the number of samples.
        named: the parameters.
        reduction: whether the loss averages or sums; by default this is determined.

    Raises:
        ArgumentError: if the loss neither averages nor sums, compares samples, or has no value for a sample alone.
    """
    parameters = list(named.values())
    alone = [_gradients_alone(loss_of, sample, parameters) for sample in range(n)]
    weights = _weights(alone, _gradients(loss_of(list(range(n))), parameters))
    if (reduction or _reduction(loss_of, n)) == "mean":
        weights = n * weights
    rows = [[weight * g for g in gradients] for weight, gradients in zip(weights, alone, strict=True)]
    return {name: torch.stack(column) for name, column in zip(named, zip(*rows, strict=True), strict=True)}


def _gradients_alone(loss_of: Callable[[list[int]], Tensor], sample: int, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of a sample's loss, without the others."""
    loss = loss_of([sample])
    if not bool(loss.isfinite()):
        raise ArgumentError(
            f"the loss that the model computes of sample {sample} alone is {float(loss.detach())}, so that there is no loop to "
            "compare with: leave it out of the batch"
        )
    return _gradients(loss, parameters)


def _gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of a loss in each parameter; zero for a parameter that the loss does not depend on."""
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    found = torch.autograd.grad(loss, list(parameters), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(parameters, found, strict=True)]


def _reduction(loss_of: Callable[[list[int]], Tensor], n: int) -> str:
    """Whether the loss averages or sums, by giving it a sample twice."""
    for sample in range(n):
        once, twice = (float(loss_of(samples).detach()) for samples in ([sample], [sample, sample]))
        for reduction, multiple in (("mean", 1), ("sum", 2)):
            if once and abs(twice - multiple * once) <= NEAR * abs(once):
                return reduction
    raise ArgumentError(
        "the loss that the model computes is neither the same nor twice as large for a sample that is given twice: say "
        'reduction="mean" or "sum"'
    )


def _weights(alone: Sequence[Sequence[Tensor]], batch: Sequence[Tensor]) -> Tensor:
    """The weight of each sample's gradient in that of the batch, by least squares; 0 for a sample without a gradient."""
    sizes = _on_host([_product(g, g) ** 0.5 for g in alone])
    used = [sample for sample, size in enumerate(sizes.tolist()) if size]
    weights = torch.zeros(len(alone), dtype=torch.float64, device=batch[0].device)
    if not used:
        return weights
    gram = _on_host([[_product(alone[i], alone[j]) for j in used] for i in used]) / sizes[used].outer(sizes[used])
    if float(torch.linalg.eigvalsh(gram)[0]) < ALIKE**2 * len(used):
        raise ArgumentError(
            "the gradients of the samples are so much alike that what each counts for in the loss that the model computes can't "
            "be told: give other samples, or fewer"
        )
    along = _on_host([_product(alone[i], batch) for i in used]) / sizes[used]
    weights[used] = (torch.linalg.solve(gram, along) / sizes[used]).to(weights)
    left = [
        b - sum(w * g for w, g in zip(weights, column, strict=True)) for b, *column in zip(batch, *alone, strict=True)
    ]
    if _product(left, left) ** 0.5 > NEAR * float((weights.cpu() * sizes).abs().sum()):
        raise ArgumentError(
            "the gradient of the batch's loss is no weighted sum of the gradients of the samples alone: the loss that the model "
            "computes compares samples, which have no gradients of their own then"
        )
    return weights


def _product(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The inner product over all parameters, the real part for complex ones."""
    return sum(float(torch.vdot(x.flatten(), y.flatten()).real) for x, y in zip(a, b, strict=True))


def _on_host(numbers: list[Any]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")
