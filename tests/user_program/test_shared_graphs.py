"""A call while the program holds a graph of its own that the model's next forward takes a part of, and attributes it left."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from torch_secorder import fisher_report
from user_program.test_functions import WAYS

REPORT = "a report of the loss on samples alone"
of_ways = pytest.mark.parametrize("way", [*WAYS, "empirical, differentiable and differentiated", REPORT])
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
    """Leaves a loss of its own in an attribute, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts, self.calls = nn.Linear(3, 3), nn.Linear(3, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1)
        self.balance, self.calls = shares.mean(0).square().sum(), self.calls + 1
        return self.experts(x) * shares


class Late(nn.Module):
    """Makes a layer, a hook, a table and a buffer in its first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.hook, self.tables, self.names = nn.Linear(3, 4), None, None, {}, None
        self.register_buffer("largest", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.head is None:
            self.head = nn.Linear(4, 3)
        if self.hook is None:
            self.hook = self.first.register_forward_hook(lambda module, args, output: output / 2)
        if "scale" not in self.tables:
            self.tables["scale"], self.names = torch.ones(4), ["scale"]
        if not self.largest.numel():
            self.largest.resize_(3).zero_()
        return self.head(self.first(x).tanh() * self.tables[self.names[0]])


def analyze(way: str, model: nn.Module, x: Tensor, y: Tensor) -> None:
    if way == REPORT:
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


RUN_THE_MODEL = pytest.mark.parametrize("way", [way for way in (*WAYS, REPORT) if not way.startswith("generalized")])


@SIZES
@RUN_THE_MODEL
def test_attributes_with_a_graph_are_the_programs_own(way: str, n: int) -> None:
    """Other attributes are as after one plain forward: no sample that is run alone leaves anything there.

    The exact Fisher is checked by a projection of the outputs, for which the whole batch runs once more.
    """
    model, x, y = Balanced(), torch.randn(n, 3), torch.randn(n, 3)
    forwards = 2 if way == "exact report" else 1
    for _ in range(4):
        value = nn.functional.mse_loss(model(x), y)
        balance, calls = model.balance, model.calls
        analyze(way, model, x, y)
        assert model.balance is balance
        assert model.calls == calls + forwards
        (value + model.balance).backward()


@RUN_THE_MODEL
def test_what_a_model_makes_in_its_first_forward_is_made_once(way: str) -> None:
    torch.manual_seed(0)
    model, x, y = Late(), torch.randn(4, 3), torch.randn(4, 3)
    for _ in range(3):
        analyze(way, model, x, y)
    assert len(model.first._forward_hooks) == 1
    expected = nn.functional.linear(x, model.first.weight, model.first.bias) / 2
    torch.testing.assert_close(model(x), model.head(expected.tanh()))
    assert model.largest.shape == (3,)


@pytest.mark.parametrize("way", [*WAYS, REPORT])
@pytest.mark.parametrize("elsewhere", ["the call", "the weights"])
def test_the_programs_own_graph_is_kept_in_other_threads(way: str, elsewhere: str) -> None:
    """Each thread numbers its nodes by itself."""
    torch.manual_seed(0)
    model, x, y = FastWeights(), torch.randn(4, 3), torch.randn(4, 3)

    def begin() -> None:
        for _ in range(300 if elsewhere == "the weights" else 20):
            model.meta(torch.ones(2)).exp().sum()
        model.begin()

    with ThreadPoolExecutor(1) as pool:
        if elsewhere == "the weights":
            pool.submit(begin).result()
            analyze(way, model, x, y)
        else:
            begin()
            pool.submit(analyze, way, model, x, y).result()
    nn.functional.mse_loss(model(x), y).backward()
    assert all(p.grad is not None for p in model.parameters())
