"""What the same numbers cost by hand: hooks that call the products of `benchmarks.bounds`, with no check and no bookkeeping."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.bounds import Sums, kept, layer

KNOWN = (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm, nn.Embedding)


class ScaledByRms(nn.Module):
    """A layer that divides by the root of the mean square, however its library writes it."""


@layer.register
def _(module: ScaledByRms, sums: Sums, x: Tensor, g: Tensor) -> None:
    scale = x.square().mean(-1, keepdim=True).add_(module.eps).rsqrt_()
    sums.squares[module.weight] = (x * scale * g).flatten(1, -2).sum(1).square().sum(1)


def as_known(module: nn.Module) -> nn.Module | None:
    """A module as the products know it; None for one that they don't."""
    if type(module).__name__.endswith("RMSNorm") and isinstance(getattr(module, "weight", None), Tensor):
        found = ScaledByRms()
        found.weight = module.weight
        found.eps = next((value for name, value in vars(module).items() if "eps" in name), 1e-6)
        return found
    return module if isinstance(module, KNOWN) or type(module).__name__ == "Conv1D" else None


def on_output(sums: Sums, known: nn.Module, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if isinstance(known, nn.Embedding) and len(output) == 1:  # of positions, which all samples share
        output = output.expand(sums.n, *output.shape[1:])
    output.register_hook(partial(on_gradient, known, sums, [*kept(known, args[0].detach(), output)]))
    return output


def on_gradient(known: nn.Module, sums: Sums, factors: list[Tensor], g: Tensor) -> None:
    layer(known, sums, *factors, g)
    factors.clear()


def by_hand(model: nn.Module, n: int, step: Callable[[nn.Module], None]) -> Callable[[], Tensor]:
    """A plain step that gives the model's trace as well; it raises, or gives another one, where the products don't know a layer.

    Args:
        model: the model, which gets hooks.
        n: how many samples there are.
        step: a plain step.
    """
    sums, parameters = Sums(model), list(model.parameters())
    sums.n = n
    for module in model.modules():
        if list(module.parameters(recurse=False)) and (known := as_known(module)) is not None:
            module.register_forward_hook(partial(on_output, sums, known))

    def whole() -> Tensor:
        sums.squares.clear()
        sums.factors.clear()
        step(model)
        torch._foreach_norm([p.grad for p in parameters if p.grad is not None and p not in sums.norms])
        model.zero_grad(set_to_none=True)
        return sums.finish().sum()

    return whole
