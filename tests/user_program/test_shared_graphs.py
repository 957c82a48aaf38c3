"""A call while the program holds a graph of its own that the model's next forward takes a part of, and attributes it left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from torch_secorder import fisher_report
from user_program.test_functions import WAYS

of_ways = pytest.mark.parametrize(
    "way", [*WAYS, "empirical, differentiable and differentiated", "a report of the loss on samples alone"]
)
SIZES = pytest.mark.parametrize("n", [1, 4, 9])


class FastWeights(nn.Module):
    """Weights that another network computes once for several calls."""

    def __init__(self) -> None:
        super().__init__()
        self.meta, self.head = nn.Linear(2, 12), nn.Linear(4, 3)
        self.begin()

    def begin(self) -> None:
        self.weight = self.meta(torch.ones(2)).view(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x @ self.weight).tanh())


class Balanced(nn.Module):
    """Leaves a loss of its own in an attribute, counts its calls, and makes what it needs in the first of them."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts, self.calls = nn.Linear(3, 3), nn.Linear(3, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1)
        self.balance, self.calls = shares.mean(0).square().sum(), self.calls + 1
        if not hasattr(self, "scale"):
            self.scale = torch.ones(3)
        return self.experts(x) * shares * self.scale


def analyze(way: str, model: nn.Module, x: Tensor, y: Tensor) -> None:
    if way == "a report of the loss on samples alone":
        fisher_report(model, nn.functional.mse_loss, (x, y), progress=False)
    elif way == "empirical, differentiable and differentiated":
        value = WAYS["empirical, differentiable"](model, x, y)
        torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    else:
        WAYS[way](model, x, y)


@SIZES
@of_ways
@pytest.mark.filterwarnings("ignore::torch_secorder.errors.SlowFallbackWarning")
def test_the_programs_own_graph_is_kept(way: str, n: int) -> None:
    """Weights that were computed before, once for the program's own step and for the call."""
    torch.manual_seed(0)
    cached, fast = nn.Sequential(weight_norm(nn.Linear(3, 5)), nn.Tanh(), nn.Linear(5, 3)), FastWeights()
    x, y = torch.randn(n, 3), torch.randn(n, 3)
    for model in (cached, fast):
        with parametrize.cached():
            value = nn.functional.mse_loss(model(x), y)
            for _ in range(4):  # of which the first three are verified
                analyze(way, model, x, y)
            value.backward()
        found = [p.grad for p in model.parameters()]
        if isinstance(model, FastWeights):
            model.begin()
        expected = torch.autograd.grad(nn.functional.mse_loss(model(x), y), list(model.parameters()))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@SIZES
@of_ways
def test_attributes_are_those_of_the_programs_own_forward(way: str, n: int) -> None:
    model, x, y = Balanced(), torch.randn(n, 3), torch.randn(n, 3)
    for _ in range(4):
        value = nn.functional.mse_loss(model(x), y)
        before = {name: dict(vars(module)) for name, module in model.named_modules()}
        if not way.startswith("generalized"):  # which are given what a forward of the program's has made
            analyze(way, model, x, y)
        for name, module in model.named_modules():
            assert vars(module).keys() == before[name].keys()
            assert all(vars(module)[key] is attribute for key, attribute in before[name].items())
        (value + model.balance).backward()


@of_ways
def test_what_a_first_forward_would_leave_is_not_there(way: str) -> None:
    if way.startswith("generalized"):
        return
    model, x, y = Balanced(), torch.randn(4, 3), torch.randn(4, 3)
    analyze(way, model, x, y)
    assert not {"balance", "scale"} & vars(model).keys()
    assert model.calls == 0
