"""A user's own layer, taught with one function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles import assert_equal, per_sample_squared_norms, total, trace
from torch_secorder import FisherMonitor, register_rule
from torch_secorder.errors import CurvatureError


class Scale(nn.Module):
    def __init__(self, features: int):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(features))
        self.shift = nn.Parameter(torch.randn(features))

    def forward(self, x: Tensor, *, power: int = 1) -> Tensor:
        return x**power * self.gain + self.shift


@register_rule(Scale)
def scale(module: Scale, call: Any) -> dict[str, Tensor]:
    (x,) = call.inputs
    positions = tuple(range(1, x.dim() - 1))
    gain = (call.grad_output * x ** call.kwargs.get("power", 1)).sum(positions) if positions else call.grad_output * x
    return {"gain": gain, "shift": call.grad_output.sum(positions) if positions else call.grad_output}


class Net(nn.Module):
    def __init__(self, scale: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.scale = scale or Scale(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.first(x).tanh())


class Squared(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.first(x).tanh(), power=2)


class Twice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.first(self.scale(x).tanh()))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("model", "shape"), [(Net, (5, 4)), (Net, (5, 3, 4)), (Squared, (5, 3, 4)), (Twice, (5, 4)), (Twice, (5, 3, 4))]
)
def test_a_registered_layer_is_exact(model: type[Net], shape: tuple[int, ...], reduction: str) -> None:
    net = model().double()
    x, y = torch.randn(2, *shape, dtype=torch.float64)
    loss_fn = nn.MSELoss(reduction=reduction)
    expected = trace(per_sample_squared_norms(net, loss_fn, x, y), reduction)
    with FisherMonitor(net, reduction=reduction, loss_scale=0.5) as monitor:
        (loss_fn(net(x), y) / 2).backward()
    report = monitor.report()
    for name, value in expected.items():
        assert_equal(torch.tensor(report.loc[name, "fisher_trace"]), value, total(expected), torch.float64)
    assert set(report["rule"]) - {"unused"}


def test_a_registered_layer_gives_its_diagonal_and_its_samples() -> None:
    net = Net().double()
    x, y = torch.randn(2, 5, 4, dtype=torch.float64)
    squared = per_sample_squared_norms(net, nn.MSELoss(), x, y)
    with FisherMonitor(net, diagonal=True, per_sample=True) as monitor:
        nn.MSELoss()(net(x), y).backward()
    for name, t in squared.items():
        assert_equal(monitor.diagonal[name].sum(), t.mean(), total(squared))
        assert_equal(torch.tensor(monitor.per_sample[name].to_numpy()), t, total(squared))


def test_a_subclass_with_its_own_forward_is_not_covered_by_its_parents_rule() -> None:
    """The graph shows how its parameters are used."""

    class Other(Scale):
        def forward(self, x: Tensor, *, power: int = 1) -> Tensor:
            return (x * self.gain).sin() + self.shift

    net = Net(Other(4)).double()
    x, y = torch.randn(2, 5, 4, dtype=torch.float64)
    expected = trace(per_sample_squared_norms(net, nn.MSELoss(), x, y))
    with FisherMonitor(net) as monitor:
        nn.MSELoss()(net(x), y).backward()
    report = monitor.report()
    for name, value in expected.items():
        assert_equal(torch.tensor(report.loc[name, "fisher_trace"]), value, total(expected), torch.float64)
    assert not report.loc[["scale.gain", "scale.shift"], "rule"].str.contains("scale").any()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda g: {"gain": g.sum(0), "shift": g}, r"gain"),
        (lambda g: {"gain": g}, r"shift"),
        (lambda g: None, r"mapping|dict"),
    ],
    ids=["wrong shape", "a parameter left out", "nothing"],
)
def test_a_rule_that_answers_wrongly_is_told_so(answer: Any, message: str) -> None:
    class Fresh(Scale):
        def forward(self, x: Tensor, *, power: int = 1) -> Tensor:
            return x * self.gain + self.shift

    register_rule(Fresh)(lambda module, call: answer(call.grad_output))
    net = Net(Fresh(4))
    with pytest.raises(CurvatureError, match=message), FisherMonitor(net):
        nn.MSELoss()(net(torch.randn(5, 4)), torch.zeros(5, 4)).backward()


@pytest.mark.parametrize("thing", [Scale(2), "Scale", int, None])
def test_only_module_types_can_be_registered(thing: Any) -> None:
    with pytest.raises((CurvatureError, TypeError), match=r"(?i)module"):
        register_rule(thing)
