"""The ways to the number: a plain step, which gives none, ours, and those of other packages.

A variant prepares a model once, as its users would, and then takes batches. What it returns is read afterwards, outside
of what is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.bounds import function_bound, loop_bound
from benchmarks.steps import Step, bare, plain
from benchmarks.workloads import Loss
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report

TOTAL = "total"


@dataclass(frozen=True)
class Variant:
    """A way to c sum_n ||g_n||^2.

    Attributes:
        prepare: from a model, which it may spoil, and a loss to the step that is timed.
        read: what the step returned, as a trace per parameter or under `TOTAL`.
        stores: whether it holds every sample's gradient at once.
        estimates: whether the number is random.
    """

    name: str
    label: str
    prepare: Callable[[nn.Module, Loss], Step]
    read: Callable[[Any], dict[str, float]]
    stores: bool = False
    estimates: bool = False


def total(value: Tensor) -> dict[str, float]:
    return {TOTAL: float(value)}


def table(report: Any) -> dict[str, float]:
    return dict(report["fisher_trace"])


def named(values: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


# Ours


def monitor(model: nn.Module, loss_fn: Loss, **options: Any) -> Step:
    """All that there is to it for one batch: hooks on, a step, hooks off, the number."""

    def step(inputs: Tensor, targets: Tensor) -> FisherMonitor:
        with FisherMonitor(model, **options) as monitor:
            loss_fn(model(inputs), targets).backward()
        float(monitor.trace)
        return monitor

    return step


def diagonal(model: nn.Module, loss_fn: Loss) -> Step:
    return monitor(model, loss_fn, diagonal=True)


def monitor_loop(model: nn.Module, loss_fn: Loss) -> Step:
    """One step of many inside of a block around the training loop, as README has it."""
    watching = FisherMonitor(model).__enter__()

    def step(inputs: Tensor, targets: Tensor) -> FisherMonitor:
        loss_fn(model(inputs), targets).backward()
        return watching

    return step


def functional(model: nn.Module, loss_fn: Loss) -> Step:
    return lambda inputs, targets: empirical_fisher_trace(model, loss_fn, inputs, targets)


def report(model: nn.Module, loss_fn: Loss) -> Step:
    return lambda inputs, targets: fisher_report(model, loss_fn, (inputs, targets), progress=False)


# No package


def squares(gradients: Tensor) -> Tensor:
    """||g_n||^2, [n], with a temporary of one sample's size where that is large; vector_norm rounds too roughly."""
    flat = gradients.flatten(1)
    return torch.stack([g.square().sum() for g in flat]) if flat.shape[1] > 4096 else flat.square().sum(1)


def vmap(model: nn.Module, loss_fn: Loss) -> Step:
    values = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], one: Tensor, target: Tensor) -> Tensor:
        return loss_fn(torch.func.functional_call(model, values, (one.unsqueeze(0),)), target.unsqueeze(0))

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def step(inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {name: squares(g).mean() for name, g in gradients(values, inputs, targets).items()}

    return step


def loop(model: nn.Module, loss_fn: Loss) -> Step:
    parameters = dict(model.named_parameters())

    def step(inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        sums = dict.fromkeys(parameters, torch.zeros(()))
        for n in range(len(inputs)):
            loss = loss_fn(model(inputs[n : n + 1]), targets[n : n + 1])
            for name, g in zip(sums, torch.autograd.grad(loss, list(parameters.values())), strict=True):
                sums[name] = sums[name] + g.square().sum()
        return {name: value / len(inputs) for name, value in sums.items()}

    return step


# Packages


def backpack(model: nn.Module, loss_fn: Loss, extension: str, attribute: str) -> Step:
    import backpack as package
    from backpack import extensions

    model = package.extend(model)
    parameters = dict(model.named_parameters())

    def step(inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        with package.backpack(getattr(extensions, extension)()):
            loss_fn(model(inputs), targets).backward()
        n, found = len(inputs), {}
        for name, p in parameters.items():
            if hasattr(p, attribute):
                found[name] = getattr(p, attribute).sum() * n  # of g_n / n
                delattr(p, attribute)
        return found

    return step


def batch_l2_grad(model: nn.Module, loss_fn: Loss) -> Step:
    return backpack(model, loss_fn, "BatchL2Grad", "batch_l2")


def sum_grad_squared(model: nn.Module, loss_fn: Loss) -> Step:
    return backpack(model, loss_fn, "SumGradSquared", "sum_grad_squared")


def opacus_hooks(model: nn.Module, loss_fn: Loss) -> Step:
    from opacus.grad_sample import GradSampleModule

    wrapped = GradSampleModule(refusing_eval(model))

    def step(inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        loss_fn(wrapped(inputs), targets).backward()
        found = {}
        for name, p in model.named_parameters():
            found[name] = squares(p.grad_sample).mean()
            p.grad_sample = None
        return found

    return step


def opacus_ghost(model: nn.Module, loss_fn: Loss) -> Step:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(refusing_eval(model))

    def step(inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        loss_fn(wrapped(inputs), targets).backward()
        found = {name: p._norm_sample.square().mean() for name, p in model.named_parameters()}
        for p in model.parameters():
            p._norm_sample = p.grad_sample = None
        return found

    return step


def refusing_eval(model: nn.Module) -> nn.Module:
    """The model; Opacus' hooks do nothing in eval mode, without a word."""
    if not model.training:
        raise ValueError("its hooks do nothing in eval mode")
    return model


def curvlinops(model: nn.Module, loss_fn: Loss) -> Step:
    from curvlinops import EFLinearOperator, hutchinson_trace
    from torch.nn.attention import SDPBackend, sdpa_kernel

    parameters = list(model.parameters())

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        positions = targets.dim() > 1  # of which it knows nothing: each is a datum
        function = nn.Sequential(model, nn.Flatten(0, 1)) if positions else model
        operator = EFLinearOperator(
            *(function, nn.CrossEntropyLoss(), parameters, [(inputs, targets.flatten())]),
            check_deterministic=False,
            num_data=targets.numel(),
            batch_size_fn=lambda _: targets.numel(),
        )
        with sdpa_kernel(SDPBackend.MATH):  # it differentiates forwards, which others don't allow
            return hutchinson_trace(operator, 10)

    return step


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("plain", "plain step", plain, lambda _: {}),
        Variant("bare", "no parameter gradients, no numbers", bare, lambda _: {}),
        Variant("loop_bound", "bound, in a loop", loop_bound, named),
        Variant("function_bound", "bound, function", function_bound, named),
        Variant("monitor", "FisherMonitor", monitor, lambda found: table(found.report())),
        Variant("monitor_loop", "FisherMonitor, in a loop", monitor_loop, lambda found: table(found.report())),
        Variant("functional", "empirical_fisher_trace", functional, total),
        Variant("report", "fisher_report", report, table),
        Variant("diagonal", "FisherMonitor, diagonal", diagonal, lambda found: table(found.report())),
        Variant("batch_l2", "BackPACK BatchL2Grad", batch_l2_grad, named),
        Variant("sum_grad_squared", "BackPACK SumGradSquared", sum_grad_squared, named),
        Variant("opacus", "Opacus hooks", opacus_hooks, named, stores=True),
        Variant("ghost", "Opacus ghost norms", opacus_ghost, named),
        Variant("vmap", "vmap(grad)", vmap, named, stores=True),
        Variant("loop", "loop over samples", loop, named),
        Variant("curvlinops", "curvlinops, 10 vectors", curvlinops, total, estimates=True),
    )
}
ALONE = "bare"
BOUNDS = {"monitor_loop": "loop_bound", "functional": "function_bound"}  # of ours
OURS = ("monitor", "monitor_loop", "functional", "report", "diagonal")
PEERS = tuple(name for name in VARIANTS if name not in (*OURS, *BOUNDS.values(), "plain", ALONE))
