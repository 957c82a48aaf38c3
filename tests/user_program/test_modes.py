"""Modes of the user's that see every operation see those of the user's program, and none of the library's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from modes import ModeInside
from problems._base import Forward
from torch_secorder import FisherMonitor
from torch_secorder.errors import LifecycleError
from traps.exactness import numbers


class Operations(TorchDispatchMode):
    """The names of all operations, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def parametrized() -> nn.Module:
    """A weight that is computed, and a parameter that is used outside of its module's forward."""
    model = Forward(lambda self, x: self.last(self.first(x) @ self.first.weight.T), first=nn.Linear(4, 4))
    model.last = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), (5, 4)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 3)),
        (5, 3, 6, 6),
    ),
    "computed weights": (parametrized, (5, 4)),
    "as many steps as samples": (
        lambda: Forward(
            lambda self, x: self.last(self.first(x.transpose(0, 1)).tanh().sum(0)),
            first=nn.Linear(4, 4),
            last=nn.Linear(4, 3),
        ),
        (5, 5, 4),
    ),
    "lstm": (
        lambda: Forward(
            lambda self, x: self.last(self.first(x)[0][:, -1]),
            first=nn.LSTM(4, 4, batch_first=True),
            last=nn.Linear(4, 3),
        ),
        (6, 5, 4),
    ),
    "checkpoint": (
        lambda: Forward(
            lambda self, x: self.last(checkpoint(self.first, x, use_reentrant=False)),
            first=nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
            last=nn.Linear(4, 3),
        ),
        (5, 4),
    ),
}
KEEPS: dict[str, Any] = {
    "traces": {},
    "everything": {"diagonal": True, "per_sample": True, "activations": True},
    "little memory": {"max_memory": 10_000},
}


def steps_under(mode: Any, name: str, options: dict[str, Any] | None, steps: int = 4) -> Any:
    """Some steps of a model under a mode, with a monitor of these options, or without."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(shape).double()
    y = torch.randn(model(x).shape).double()
    monitor = None if options is None else FisherMonitor(model, **options)

    def train() -> None:
        for step in range(steps):
            if monitor is not None and step == 1:
                monitor.__enter__()
            loss = numbers(model(x), y)
            loss.backward()
        if monitor is not None:
            monitor.__exit__()

    with mode:
        train()
    return mode


@pytest.mark.parametrize("keeps", KEEPS)
@pytest.mark.parametrize("name", MODELS)
def test_a_mode_sees_the_operations_of_the_program(name: str, keeps: str) -> None:
    plain = steps_under(Operations(), name, None).names
    watched = steps_under(Operations(), name, KEEPS[keeps]).names
    assert watched == plain
    assert len(plain) > 80


def test_a_counter_of_operations_counts_those_of_the_program() -> None:
    plain, watched = (
        steps_under(FlopCounterMode(display=False), "mlp", options).get_total_flops() for options in (None, {})
    )
    assert watched == plain > 0


def test_a_mode_sees_a_second_pass_that_is_refused() -> None:
    names = []
    for watched in (False, True):
        torch.manual_seed(0)
        model, mode = nn.Linear(4, 3), Operations()
        monitor = FisherMonitor(model, on_refusal="raise")
        if watched:
            monitor.__enter__()
        with mode:
            loss = model(torch.ones(5, 4)).square().sum(1).mean()
            loss.backward(retain_graph=True)
            try:
                loss.backward()
            except LifecycleError:
                assert watched
        if watched:
            monitor.__exit__()
        names.append(mode.names)
    assert names[0] == names[1]


class OperationsInside(ModeInside, Operations):
    """As above, and nothing is hidden from it."""


def test_a_mode_of_the_tests_sees_the_librarys_operations() -> None:
    """Or what is injected by one would be injected nowhere."""
    plain, hidden, seen = (
        len(steps_under(mode, "mlp", options).names)
        for mode, options in ((Operations(), None), (Operations(), {}), (OperationsInside(), {}))
    )
    assert seen > hidden == plain


def test_the_numbers_under_a_mode_are_those_without() -> None:
    def trace(mode: Any) -> Tensor:
        torch.manual_seed(0)
        model, x, y = nn.Linear(4, 3).double(), torch.randn(5, 4).double(), torch.randn(5, 3).double()
        with FisherMonitor(model) as monitor, mode:
            numbers(model(x), y).backward()
        return torch.stack([monitor.trace, torch.tensor(monitor.report().grad_sq_norm.sum())])

    assert torch.allclose(trace(Operations()), trace(torch.enable_grad()), rtol=1e-12)


class Functions(TorchFunctionMode):
    """The names of all functions that are called, in order, and attributes that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODELS)
def test_a_mode_of_functions_sees_the_programs_calls_and_the_librarys(name: str) -> None:
    plain = steps_under(Functions(), name, None).names
    watched = steps_under(Functions(), name, {}).names
    rest = iter(watched)
    assert all(one in rest for one in plain)  # in their order
    assert len(watched) > len(plain) > 20
