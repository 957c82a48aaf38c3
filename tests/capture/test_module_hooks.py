"""What is recorded of a module's call: its inputs as it saw them, however they came and wherever they are kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from expectations import expectation
from model_state import assert_same_gradients, gradients, hooks
from oracles import assert_equal, per_sample_squared_norms, total, trace
from problems._base import Forward, randomized
from torch_secorder import FisherMonitor
from torch_secorder.errors import CurvatureError


def numbers(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().flatten(1).sum(1).mean()


def assert_exact(
    model: nn.Module,
    x: Any,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    plain: nn.Module | None = None,
    **options: Any,
) -> None:
    """The monitor's traces are those of a loop, over a plain model where this one can't run alone; gradients stay as they are."""
    with torch.no_grad():
        y = torch.randn_like(model(x))
    expected = per_sample_squared_norms(
        plain or model, numbers, x, y, parameters=options.get("parameters", "trainable")
    )
    numbers(model(x), y).backward()
    before = gradients(model)
    model.zero_grad()
    with FisherMonitor(model, **options) as monitor:
        with around():
            loss = numbers(model(x), y)
        loss.backward()
    found = torch.tensor(monitor.report()["fisher_trace"].to_numpy())
    assert_equal(found, torch.stack(list(trace(expected).values())), total(trace(expected)), torch.float64)
    assert_same_gradients(gradients(model), before)
    assert not any(hooks(model).values())


def two_layers() -> nn.Module:
    return randomized(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).double()


def inputs(*shape: int) -> Tensor:
    return torch.randn(*(shape or (6, 4)), dtype=torch.float64)


# Arguments


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.both(x, x.flip(-1)),
        lambda m, x: m.both(x, input2=x.flip(-1)),
        lambda m, x: m.both(input2=x.flip(-1), input1=x),
    ],
    ids=["by position", "by both", "by keyword"],
)
def test_arguments_by_position_and_by_keyword(forward: Callable[..., Tensor]) -> None:
    assert_exact(randomized(Forward(forward, both=nn.Bilinear(4, 4, 3))).double(), inputs())


def test_a_users_hooks_change_what_goes_in_and_what_comes_out() -> None:
    """The layer's own input is what its pre-hook gave it, and its own output what it computed."""
    model = two_layers()
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model[0].register_forward_hook(lambda module, args, output: output.flip(-1) + 1)
    model[2].register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0].exp(),), kwargs), with_kwargs=True, prepend=True
    )
    x, y = inputs(), torch.randn(6, 3, dtype=torch.float64)
    expected = per_sample_squared_norms(model, numbers, x, y)  # the copies in there have these hooks too
    with FisherMonitor(model) as monitor:
        numbers(model(x), y).backward()
    for name, t in expected.items():
        found = torch.tensor(monitor.report().loc[name, "fisher_trace"])
        assert_equal(found, t.mean(), total(trace(expected)), torch.float64)


# Outputs that are views, and in-place changes


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.relu_(),
        lambda h: h.view(-1, 5).mul_(2).view(h.shape),
        lambda h: h.transpose(1, 2).contiguous().add_(1).transpose(1, 2),
        lambda h: torch.cat([h[..., :2].mul_(3), h[..., 2:]], -1),
    ],
    ids=["whole", "through a view", "of a copy", "through a slice"],
)
@pytest.mark.parametrize("bias", [True, False])
def test_an_output_changed_in_place(change: Callable[[Tensor], Tensor], bias: bool) -> None:
    """A Linear's output is a view where it has a bias and three axes."""
    model = Forward(lambda m, x: m.two(change(m.one(x))), one=nn.Linear(4, 5, bias=bias), two=nn.Linear(5, 3))
    assert_exact(randomized(model).double(), inputs(6, 3, 4))


def test_an_input_changed_in_place_before_the_layer_sees_it() -> None:
    model = Forward(
        lambda m, x: m.two(m.one(x.clone().mul_(2)).add_(1).tanh()), one=nn.Linear(4, 5), two=nn.Linear(5, 3)
    )
    assert_exact(randomized(model).double(), inputs())


@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(5, 4)], ids=lambda x: type(x).__name__
)
def test_an_input_changed_in_place_after_the_layer_saw_it(layer: nn.Module) -> None:
    """Autograd needs it too, and says so itself; for a frozen layer nobody does but the monitor."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = x.clone()
        out = m.layer(h)
        h.mul_(0)
        return m.last(out.tanh())

    model = randomized(Forward(forward, layer=layer, last=nn.Linear(4, 3))).double()
    x = torch.randint(5, (6, 4)) if isinstance(layer, nn.Embedding) else inputs()
    with FisherMonitor(model), pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        model(x).square().sum().backward()
    model.layer.requires_grad_(False)
    with (
        FisherMonitor(model, parameters="all"),
        pytest.raises(CurvatureError, match=rf"{type(layer).__name__} 'layer': its input was changed in place"),
    ):
        model(x).square().sum().backward()


# Tensors that something else keeps


class Pack:
    """Hooks for saved tensors that hand out copies and count what they gave back."""

    def __init__(self) -> None:
        self.unpacked = 0

    def __call__(self) -> AbstractContextManager[Any]:
        return saved_tensors_hooks(lambda x: x.clone(), self.unpack)

    def unpack(self, x: Tensor) -> Tensor:
        self.unpacked += 1
        return x


def test_inputs_come_through_the_hooks_for_saved_tensors() -> None:
    pack = Pack()
    assert_exact(two_layers(), inputs(), pack)
    assert pack.unpacked >= 2, "of each layer's input at least"


def test_tensors_saved_on_the_cpu() -> None:
    assert_exact(two_layers(), inputs(6, 3, 4), save_on_cpu)


def test_an_input_that_was_packed_may_be_changed_in_place() -> None:
    """The copy that a hook made of it is as it was."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = x.clone()
        out = m.frozen(h)
        h.mul_(0)
        return m.last(out.tanh())

    def untouched(m: Any, x: Tensor) -> Tensor:
        return m.last(m.frozen(x).tanh())

    layers = {"frozen": nn.Linear(4, 4).requires_grad_(False), "last": nn.Linear(4, 3)}
    model = randomized(Forward(forward, **layers)).double()
    assert_exact(model, inputs(), Pack(), Forward(untouched, **layers), parameters="all")


# Layers that run again


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-re-entrant", "re-entrant"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_layers_that_a_checkpoint_runs_again_count_once(use_reentrant: bool) -> None:
    """Also one inside of another, and beside layers that run once."""

    def inner(m: Any, h: Tensor) -> Tensor:
        return checkpoint(m.two, m.one(h).tanh(), use_reentrant=use_reentrant)

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.first(x).tanh()
        return m.last(h + checkpoint(lambda h: inner(m, h), h, use_reentrant=use_reentrant))

    layers = {name: nn.Linear(4, 4) for name in ("first", "one", "two", "last")}
    plain = Forward(lambda m, x: m.last((h := m.first(x).tanh()) + m.two(m.one(h).tanh())), **layers)
    model = randomized(Forward(forward, **layers)).double()
    assert_exact(model, inputs(), plain=plain)
    monitor = FisherMonitor(model)
    with monitor:
        for _ in range(2):
            model(inputs()).square().sum().backward()
    assert monitor.n_samples == 12


@pytest.mark.parametrize(
    ("second", "refusal"),
    [(6, ""), (3, r"Linear 'body': its output has shape \(6, 4\).*is not the batch of 3 samples")],
)
def test_a_checkpoint_that_runs_again_after_another_forward(second: int, refusal: str) -> None:
    """Nothing tells which run a checkpoint's layers are of, and the latest counts."""
    layers = {"first": nn.Linear(4, 4), "body": nn.Linear(4, 4)}
    model = Forward(lambda m, x: checkpoint(m.body, m.first(x).tanh(), use_reentrant=False), **layers)
    model = randomized(model).double()
    batches = [(inputs(n, 4), inputs(n, 4)) for n in (6, second)]
    with FisherMonitor(model) as monitor:
        losses = [numbers(model(x), y) for x, y in batches]
        with expectation(refusal):
            losses[0].backward()
        losses[1].backward()
    batches = batches[1:] if refusal else batches
    expected = per_sample_squared_norms(model, numbers, *(torch.cat(parts) for parts in zip(*batches, strict=True)))
    assert_equal(monitor.trace, total(trace(expected)), monitor.trace)
    assert monitor.n_samples == sum(len(y) for _, y in batches)
