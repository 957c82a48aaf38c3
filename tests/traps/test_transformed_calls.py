"""Trap 31: modules that a model calls under transforms of torch.func, where nothing shows the gradient of their outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from problems._base import Forward, randomized
from torch_secorder import FisherMonitor, fisher_results
from torch_secorder.errors import UnsupportedError
from torch_secorder.pruning import Gates
from traps.exactness import assert_exact, numbers

N, WIDTH = 5, 4
HIDDEN = r"Linear 'l' was called under a transform of torch.func"


def adapted(m: Any, x: Tensor) -> Tensor:
    """A gradient step on a sample's first half, from the outcome of which its second half is predicted."""
    own = dict(m.l.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return (torch.func.functional_call(m.l, weights, (x,)) - x).square().sum()

    def moved(x: Tensor) -> Tensor:
        slopes = torch.func.grad(loss)(own, x[:2])
        return torch.func.functional_call(m.l, {name: p - 0.1 * slopes[name] for name, p in own.items()}, (x[2:],))

    return m.h(torch.stack([moved(one) for one in x]))


def one_by_one(m: Any, x: Tensor) -> Tensor:
    return m.h(torch.func.vmap(m.l)(x).tanh())


def setting(forward: Any) -> tuple[nn.Module, Tensor, Tensor]:
    model = randomized(Forward(forward, l=nn.Linear(WIDTH, WIDTH), h=nn.Linear(WIDTH, WIDTH))).double()
    x = torch.randn(N, 4, WIDTH).double()
    return model, x, torch.randn_like(model(x)).detach()


@pytest.mark.parametrize("forward", [adapted, one_by_one])
def test_trap_31_gates_of_calls_under_transforms_are_refused(forward: Any) -> None:
    model, x, y = setting(forward)
    with pytest.raises(UnsupportedError, match=HIDDEN), Gates(model):
        model(x)
    with Gates(model, {"h": {}}) as gates:  # as the message says
        numbers(model(x), y).backward()
    outputs = model.h.register_forward_hook(lambda module, args, output: output * gate)
    expected = []
    for i in range(N):
        gate = torch.ones(WIDTH, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(numbers(model(x[i : i + 1]), y[i : i + 1]), gate)
        expected.append(slope.square())
    outputs.remove()
    torch.testing.assert_close(gates.fisher["h"], torch.stack(expected).mean(0), rtol=1e-8, atol=0)


def test_trap_31_activations_of_calls_of_which_only_some_are_seen_are_refused() -> None:
    model, x, y = setting(adapted)
    with pytest.raises(UnsupportedError, match=HIDDEN), FisherMonitor(model, activations=True):
        model(x)
    with pytest.raises(UnsupportedError, match=HIDDEN):
        fisher_results(model, numbers, [(x, y)], activations=True, progress=False)
    assert_exact(model, x, y)  # without activations=, as the message says


def test_trap_31_activations_of_calls_that_are_all_under_transforms_are_left_out() -> None:
    model, x, y = setting(one_by_one)
    with FisherMonitor(model, activations=True) as monitor:
        numbers(model(x), y).backward()
    of_library = fisher_results(model, numbers, [(x, y)], activations=True, progress=False)
    assert list(monitor.activations.index) == list(of_library.activations.index) == ["", "h"]
    assert_exact(model, x, y)
