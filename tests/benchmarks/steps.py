"""Steps that give no numbers: the one that was running anyway, and what is left of it without gradients of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.workloads import Loss

Step = Callable[[Tensor, Tensor], Any]


def plain(model: nn.Module, loss_fn: Loss) -> Step:
    def step(inputs: Tensor, targets: Tensor) -> None:
        loss_fn(model(inputs), targets).backward()

    return step


class FromHere(torch.autograd.Function):
    """The same tensor, from which on there is a graph."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def bare(model: nn.Module, loss_fn: Loss) -> Step:
    """What is left of a plain step where no parameter's gradient is asked for, only those that lead to the first layers."""
    anchor = torch.zeros((), requires_grad=True)

    def start(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        return None if not isinstance(output, Tensor) or output.requires_grad else FromHere.apply(output, anchor)

    def into(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x + anchor if isinstance(x, Tensor) else x for x in args)  # it trains only then

    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.register_forward_pre_hook(into)
        elif list(module.parameters(recurse=False)):
            module.register_forward_hook(start)
    for p in model.parameters():
        p.requires_grad_(False)

    def step(inputs: Tensor, targets: Tensor) -> None:
        torch.autograd.grad(loss_fn(model(inputs), targets), anchor, allow_unused=True)

    return step
