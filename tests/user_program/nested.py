"""Programs with a backward pass inside of another: offloading, reversible layers, checkpointing, equilibria."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from problems._base import Forward
from user_program.hooks import Hooked, full_backward_hooks, module_forward_hooks, post_accumulate_hooks, tensor_hooks
from user_program.observed import Run
from user_program.program import Program
from user_program.subjects import Subject


class Offloaded(torch.autograd.Function):
    """Runs a block again in backward, in a pass of its own that writes .grad, as old checkpointing and offloading do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: nn.Module) -> Tensor:
        ctx.block, ctx.x = block, x.detach()
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            torch.autograd.backward(ctx.block(x), grads)
        return x.grad, None


class Returned(torch.autograd.Function):
    """Runs a block again in backward, and returns the gradients of its parameters, which are inputs of this one."""

    @staticmethod
    def forward(ctx: Any, block: nn.Module, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.block, ctx.x, ctx.parameters = block, x.detach(), parameters
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            found = torch.autograd.grad(ctx.block(x), (x, *ctx.parameters), grads)
        return None, *found


class Reversible(torch.autograd.Function):
    """Finds its inputs from its outputs in backward, as RevNets and Reformers do: y1 = x1 + f(x2), y2 = x2 + f(y1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: nn.Module) -> Tensor:
        with torch.no_grad():
            x1, x2 = x.chunk(2, -1)
            y1 = x1 + f(x2)
            y2 = x2 + f(y1)
        ctx.f, ctx.y1, ctx.y2 = f, y1, y2
        return torch.cat([y1, y2], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        d1, d2 = grads[0].chunk(2, -1)
        with torch.enable_grad():
            y1 = ctx.y1.detach().requires_grad_()
            f_of_y1 = ctx.f(y1)
            torch.autograd.backward(f_of_y1, d2)
            x2 = (ctx.y2 - f_of_y1).detach().requires_grad_()
            d1 = d1 + y1.grad
            torch.autograd.backward(ctx.f(x2), d1)
        return torch.cat([d1, d2 + x2.grad], -1), None


def reversible_in_plain(m: Any, x: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, -1)
    y1 = x1 + m.body(x2)
    return torch.cat([y1, x2 + m.body(y1)], -1)


BODIES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "offloaded": lambda m, h: Offloaded.apply(h, m.body),
    "returned gradients": lambda m, h: Returned.apply(m.body, h, *m.body.parameters()),
    "reversible": lambda m, h: Reversible.apply(h, m.body),
    "checkpointed": lambda m, h: checkpoint(m.body, h, use_reentrant=False),
    "checkpointed re-entrantly": lambda m, h: checkpoint(m.body, h, use_reentrant=True),
}


def model(way: Callable[[Any, Tensor], Tensor], width: int) -> nn.Module:
    return Forward(
        lambda m, x: m.last(way(m, m.first(x).tanh())),
        first=nn.Linear(4, 4),
        body=nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)),
        last=nn.Linear(4, 3),
    )


def subject(name: str) -> Subject:
    """The recomputing model, and one that runs its body as it stands for the loop over samples."""
    halves = name == "reversible"
    plain: Callable[[Any, Tensor], Tensor] = reversible_in_plain if halves else lambda m, h: m.body(h)
    width = 2 if halves else 4
    return Subject(name, partial(model, BODIES[name], width), (6, 4), partial(model, plain, width))


class Equilibrium(nn.Module):
    """A layer that returns its fixed point, whose gradient a hook finds by many passes through the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.inject, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        injected, z = self.inject(x), torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(8):
                z = (self.layer(z) / 4 + injected).tanh()
        found = (self.layer(z) / 4 + injected).tanh()
        start = z.detach().requires_grad_()
        again = (self.layer(start) / 4 + injected).tanh()

        def solved(grad: Tensor) -> Tensor:
            solution = grad
            for _ in range(6):
                solution = torch.autograd.grad(again, start, solution, retain_graph=True)[0] + grad
            return solution

        if found.requires_grad:
            found.register_hook(solved)
        return self.head(found)


EQUILIBRIUM = Subject("equilibrium", Equilibrium, (6, 4))


def nothing(run: Run, model: nn.Module) -> None:
    """No hooks."""


def training(subject: Subject, hooked: Hooked = nothing) -> Callable[[Run], None]:
    def program(run: Run) -> None:
        model = subject.model()
        hooked(run, model)
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        with run.block(model):
            for x, y in subject.batches(3):
                optimizer.zero_grad()
                subject.step(run, model, x, y)
                optimizer.step()

    return program


WITH: dict[str, Hooked] = {
    "no hooks": nothing,
    "tensor hooks": tensor_hooks,
    "module forward hooks": module_forward_hooks,
    "full backward hooks": full_backward_hooks,
    "post-accumulate hooks": post_accumulate_hooks,
}
NESTED: list[Program] = [
    *(Program(f"{name}, {kind}", training(subject(name), hooked)) for name in BODIES for kind, hooked in WITH.items()),
    Program("equilibrium", training(EQUILIBRIUM)),
    Program("equilibrium, module forward hooks", training(EQUILIBRIUM, module_forward_hooks)),
]
