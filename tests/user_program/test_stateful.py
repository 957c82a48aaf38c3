"""Code that a look through the graph must not run, since it changes what it keeps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from oracles import per_sample_squared_norms
from problems._base import Forward
from torch_secorder import (
    FisherMonitor,
    empirical_fisher_trace,
    fisher_report,
    generalized_fisher_trace,
    hessian_trace,
)
from torch_secorder.errors import SkippedPassWarning, UnsupportedError
from traps.exactness import assert_exact, numbers


class Rotated(torch.autograd.Function):
    """Writes on its own buffer in its backward, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.cos = x.detach().cos()
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ctx.cos.mul_(grad)


class Counted(torch.autograd.Function):
    """Counts its calls in an attribute of its class."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        Counted.calls += 1
        return grad * (1 - ctx.saved_tensors[0].tanh().square())


class Fused(torch.autograd.Function):
    """Adds a weight's gradient to an attribute of the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        weight.main_grad.add_(grad.T @ x)
        return grad @ weight, torch.zeros_like(weight)


class Offloaded:
    """Hooks that keep what is saved elsewhere, and give each tensor back once."""

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}

    def pack(self, x: Tensor) -> int:
        self.kept[len(self.kept)] = x
        return len(self.kept) - 1

    def unpack(self, number: int) -> Tensor:
        return self.kept.pop(number)


def through_offloading(self: Any, x: Tensor) -> Tensor:
    hooks = Offloaded()
    with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
        return self.last(self.first(x).tanh())


def selective() -> Any:
    return create_selective_checkpoint_contexts(lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE)


WAYS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a buffer that is written to": lambda self, x: self.last(Rotated.apply(self.first(x))),
    "selective checkpointing": lambda self, x: self.last(
        checkpoint(lambda h: self.first(h).tanh(), x, use_reentrant=False, context_fn=selective)
    ),
}


def made(forward: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return Forward(forward, first=nn.Linear(4, 4), last=nn.Linear(4, 3)).double()


def trained(model: nn.Module, x: Tensor, y: Tensor, steps: int = 3) -> list[Tensor]:
    for _ in range(steps):
        numbers(model(x), y).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("way", WAYS)
def test_the_users_gradients_are_those_of_their_code(way: str) -> None:
    x, y = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    expected = trained(made(WAYS[way]), x, y)
    model = made(WAYS[way])
    with FisherMonitor(model) as monitor:
        found = trained(model, x, y)
    assert len(found) == len(expected) == 4
    assert all(map(torch.equal, found, expected))
    assert monitor.n_samples == 15
    model.zero_grad()
    plain = made(lambda self, x: self.last(self.first(x).sin() if "buffer" in way else self.first(x).tanh()))
    with FisherMonitor(model) as watched, FisherMonitor(plain) as right:
        numbers(model(x), y).backward()
        numbers(plain(x), y).backward()
    torch.testing.assert_close(watched.trace, right.trace, rtol=1e-8, atol=0)


def products_kept() -> Any:
    """Contexts that keep matrix products, which can be asked for once."""

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if "mm" in str(operation) else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def with_products_kept(self: Any, x: Tensor) -> Tensor:
    return self.last(checkpoint(lambda h: self.first(h).tanh(), x, use_reentrant=False, context_fn=products_kept))


Call = Callable[[nn.Module, Tensor, Tensor], Any]
ONE_PASS: dict[str, Call] = {
    "empirical": lambda model, x, y: empirical_fisher_trace(model, numbers, x, y),
    "differentiable": lambda model, x, y: empirical_fisher_trace(model, numbers, x, y, create_graph=True),
    "report": lambda model, x, y: fisher_report(model, numbers, (x, y), progress=False)["fisher_trace"].sum(),
}
SEVERAL_PASSES: dict[str, Call] = {
    "generalized": lambda model, x, y: generalized_fisher_trace(model, model(x), y, "mse"),
    "exact report": lambda model, x, y: fisher_report(
        model, None, (x, y), loss_type="mse", fisher="exact", progress=False
    ),
}


@pytest.mark.parametrize("call", ONE_PASS)
def test_a_call_through_selective_checkpoints_is_exact(call: str) -> None:
    model, x, y = made(with_products_kept), torch.randn(5, 4).double(), torch.randn(5, 3).double()
    plain = made(lambda self, x: self.last(self.first(x).tanh()))
    right = torch.stack([t.mean() for t in per_sample_squared_norms(plain, numbers, x, y).values()]).sum()
    for _ in range(4):  # checked and unchecked
        found = torch.as_tensor(ONE_PASS[call](model, x, y)).detach()
        torch.testing.assert_close(found, right, rtol=1e-8, atol=0)


@pytest.mark.parametrize("call", SEVERAL_PASSES)
def test_several_passes_through_selective_checkpoints_are_refused_in_words(call: str) -> None:
    model, x, y = made(with_products_kept), torch.randn(5, 4).double(), torch.randn(5, 3).double()
    with pytest.raises(UnsupportedError, match=r"selective activation checkpointing \(context_fn=\)"):
        SEVERAL_PASSES[call](model, x, y)


def test_a_hessian_through_selective_checkpoints_is_that_without_them() -> None:
    """The library's own run takes no checkpoints where it differentiates twice."""
    x, y = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    models = (made(with_products_kept), made(lambda self, x: self.last(self.first(x).tanh())))
    found = [hessian_trace(m, numbers, x, y, num_samples=8, generator=torch.Generator().manual_seed(0)) for m in models]
    pd.testing.assert_frame_equal(*found, rtol=1e-10)


def test_tensors_that_are_given_back_once() -> None:
    """The layers' own inputs go through the same hooks, and are asked for once."""
    model, x, y = made(through_offloading), torch.randn(5, 4).double(), torch.randn(5, 3).double()
    expected = trained(made(through_offloading), x, y)
    with FisherMonitor(model):
        found = trained(model, x, y)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("steps_first", [False, True])  # where samples have to be looked for, what shows them is hidden
def test_a_function_that_counts_its_calls_counts_those_of_the_program(steps_first: bool) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = Counted.apply(self.first(x.transpose(0, 1) if steps_first else x))
        return self.last(h.sum(0) if steps_first else h)

    model, Counted.calls = made(forward), 0
    x, y = torch.randn(5, *[5] * steps_first, 4).double(), torch.randn(5, 3).double()
    with FisherMonitor(model, on_refusal="skip") as monitor, warnings.catch_warnings():
        warnings.simplefilter("ignore", SkippedPassWarning)
        for _ in range(3):
            numbers(model(x), y).backward()
    assert Counted.calls == 3
    assert monitor.n_samples == (0 if steps_first else 15)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_gradient_that_is_added_up_elsewhere_is_added_up_once(frozen: bool) -> None:
    x, y = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    sums = []
    for watched in (False, True):
        model = made(lambda self, x: self.last(Fused.apply(self.first(x), self.fused.weight).tanh()))
        torch.manual_seed(1)
        model.fused = nn.Linear(4, 4, bias=False).double()
        model.fused.weight.main_grad = torch.zeros(4, 4).double()  # type: ignore[attr-defined]
        model.fused.weight.requires_grad_(not frozen)
        if not watched:
            numbers(model(x), y).backward()
        elif frozen:
            with FisherMonitor(model):
                numbers(model(x), y).backward()
        else:
            refused = pytest.raises(
                UnsupportedError, match=r"fused\.weight: used by .*\(main_grad\).* none arrives in \.grad"
            )
            with refused, FisherMonitor(model):
                model(x)
            continue
        sums.append(model.fused.weight.main_grad)  # type: ignore[attr-defined]
    assert all(torch.equal(total, sums[0]) for total in sums)


def test_a_loss_that_calls_the_model_itself() -> None:
    """As consistency losses and preference optimization do."""
    model, x, y = (
        made(lambda self, x: self.last(self.first(x).tanh())),
        torch.randn(5, 4).double(),
        torch.randn(5, 3).double(),
    )

    def consistent(outputs: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            reference = model(torch.cat([targets, targets[:, :1]], 1))
        return (outputs - 0.5 * reference - targets).square().sum(1).mean()

    with FisherMonitor(model) as monitor:
        consistent(model(x), y).backward()
    for found in (
        empirical_fisher_trace(model, consistent, x, y),
        fisher_report(model, consistent, (x, y), progress=False, verify=False)["fisher_trace"].sum(),
    ):
        torch.testing.assert_close(torch.tensor(float(found)), monitor.trace.float())


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch's own, of forward mode
def test_forward_mode_is_no_training() -> None:
    model, x, y = made(lambda self, x: self.last(self.first(x).tanh())), torch.randn(5, 4).double(), torch.randn(5, 3)
    with FisherMonitor(model) as monitor:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            outputs = model(dual)
            assert torch.autograd.forward_ad.unpack_dual(outputs).tangent is not None
        numbers(model(x), y).backward()
    assert monitor.n_samples == 5


def test_a_function_of_saved_tensors_and_constants_is_looked_through() -> None:
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
            ctx.factor = factor
            return factor * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            return ctx.factor * grad, None

    forward = partial(_scaled_steps_first, Scaled)
    model = Forward(forward, first=nn.Linear(4, 4), last=nn.Linear(4, 3)).double()
    assert_exact(model, torch.randn(5, 5, 4).double(), torch.randn(5, 3).double())


SETTINGS = {"factor": 3.0}


class ByGlobalSettings(torch.autograd.Function):
    """Reads a mapping that outlives it, and might write to it for all that its name tells."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return SETTINGS["factor"] * x @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return SETTINGS["factor"] * grad @ weight.T, SETTINGS["factor"] * x.T @ grad


class ByOwnSettings(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.factor = SETTINGS["factor"]
        return ctx.factor * x @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return ctx.factor * grad @ weight.T, ctx.factor * x.T @ grad


def test_a_function_that_names_a_mapping_from_outside_is_told_to_keep_its_numbers() -> None:
    def model(function: Any) -> nn.Module:
        found = Forward(lambda m, x: m.last(function.apply(x, m.weight).tanh()), last=nn.Linear(4, 3))
        found.weight = nn.Parameter(torch.randn(4, 4))
        return found.double()

    x, y = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    refused = model(ByGlobalSettings)
    for ask in (
        lambda: trained(refused, x, y, steps=1),
        lambda: fisher_report(refused, numbers, (x, y), progress=False),
        lambda: empirical_fisher_trace(refused, numbers, x, y),
    ):
        with pytest.raises(UnsupportedError, match="keep its numbers as attributes of ctx"), FisherMonitor(refused):
            ask()
    assert_exact(model(ByOwnSettings), x, y)
    # What lies on the way only is looked through where that is needed, and no parameter of it is asked for here.
    last_only = model(ByGlobalSettings)
    last_only.weight.requires_grad_(False)
    assert_exact(last_only, x, y)


def _scaled_steps_first(function: Any, self: Any, x: Tensor) -> Tensor:
    return self.last(function.apply(self.first(x.transpose(0, 1)), 2.0).tanh().sum(0))


@pytest.mark.parametrize("watched_passes", [0, 3])  # after three, the next pass is not one whose sums are checked
def test_a_hook_on_a_node_that_changes_its_gradient_is_in_the_numbers(watched_passes: int) -> None:
    def hooked(hooks: list[Any], self: Any, x: Tensor) -> Tensor:
        outputs = self.last(self.first(x).tanh())
        for hook in hooks:
            outputs.grad_fn.register_prehook(hook)
        return outputs

    hooks: list[Any] = []
    model = made(partial(hooked, hooks))
    x, y = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    with FisherMonitor(model, per_sample=True) as monitor:
        for _ in range(watched_passes):
            numbers(model(x), y).backward()
        hooks.append(lambda grads: (2 * grads[0],))
        numbers(model(x), y).backward()
    with FisherMonitor(model, per_sample=True) as doubled:
        hooks.clear()
        (2 * numbers(model(x), y)).backward()
    for name in ("last.weight", "last.bias", "first.weight"):
        found = torch.tensor(monitor.per_sample[name].to_numpy()[-5:])
        torch.testing.assert_close(found, torch.tensor(doubled.per_sample[name].to_numpy()))
