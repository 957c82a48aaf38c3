"""What is right: every sample's gradients by plain autograd, alone and in its batch. Nothing here knows the library."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Loss = Callable[[Any, Tensor], tuple[Tensor, Tensor]]
Rows = dict[str, Tensor]  # by parameter, [n, *shape] in float64


def running(model: nn.Module, x: Tensor, dtype: str) -> Any:
    """The outputs, in float32 where the model runs in half precision."""
    with precision(x, dtype):
        return tree_map(lambda z: z.float() if dtype == "autocast" else z, model(x))


def precision(x: Tensor, dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Half precision on the device of a tensor, or nothing."""
    return torch.autocast(x.device.type, torch.bfloat16) if dtype == "autocast" else contextlib.nullcontext()


def rows(named: dict[str, Tensor], scalars: Sequence[Tensor]) -> Rows:
    """The gradients of some scalars, a row for each; by way of .grad, since re-entrant checkpointing allows nothing else."""
    found: dict[str, list[Tensor]] = {name: [] for name in named}
    for scalar in scalars:
        for p in named.values():
            p.grad = None
        if scalar.requires_grad:
            scalar.backward(retain_graph=True)
        for name, p in named.items():
            found[name].append((torch.zeros_like(p) if p.grad is None else p.grad).detach().double())
            p.grad = None
    return {name: torch.stack(each) for name, each in found.items()}


def in_batch(model: nn.Module, named: dict[str, Tensor], loss: Loss, x: Tensor, y: Tensor, dtype: str) -> Rows:
    """The gradients of every sample's share of the batch's loss, through the graph of the batch."""
    return rows(named, list(loss(running(model, x, dtype), y)[1]))


def alone(
    model: nn.Module, named: dict[str, Tensor], loss: Loss, x: Tensor, y: Tensor, dtype: str, axis: int
) -> Rows | None:
    """The same with every sample alone in the model, its output put into its row of the batch's; None if that can't run."""
    with torch.no_grad():
        batch = running(model, x, dtype)
    each = []
    for n in range(len(y)):
        try:
            out = running(model, x.narrow(axis, n, 1), dtype)
        except (RuntimeError, ValueError, IndexError):
            return None
        place = torch.arange(len(y)) == n
        each.append(rows(named, [loss(_replaced(batch, out, place, axis), y)[1][n]]))
    return {name: torch.cat([one[name] for one in each]) for name in named}


# The distance from 1 to the next number, of the numbers that a model computes with.
ROUNDING = {"float64": 2.0**-52, "float32": 2.0**-23, "autocast": 2.0**-8}


def moved_by_rounding(model: nn.Module, x: Tensor, dtype: str, seed: int) -> Tensor:
    """An input, each number changed by up to one rounding; all parameters of the model are changed in place likewise."""
    generator = torch.Generator().manual_seed(seed)

    def moved(z: Tensor) -> Tensor:
        steps = torch.rand(z.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return z * (1 + steps.to(z.device, z.dtype) * ROUNDING[dtype])

    with torch.no_grad():
        for p in model.parameters():
            p.copy_(moved(p) if p.is_floating_point() else p)
    return moved(x)


def _replaced(batch: Any, out: Any, place: Tensor, axis: int) -> Any:
    if isinstance(batch, dict):
        return {key: _replaced(batch[key], out[key], place, axis) for key in batch}
    return torch.where(place.view([-1 if i == axis else 1 for i in range(batch.dim())]), out, batch)


def squared_norms(rows: Rows) -> dict[str, Tensor]:
    """t_{n,p}, by parameter."""
    return {name: (g.flatten(1) if g.dim() > 1 else g[:, None]).square().sum(1) for name, g in rows.items()}
