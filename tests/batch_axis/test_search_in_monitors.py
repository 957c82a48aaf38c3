"""The search for samples as its user meets it: how often it goes through the graph, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles import assert_equal
from torch_secorder import FisherMonitor
from torch_secorder.errors import CurvatureError

PASSES: list[int] = []
note = PASSES.append  # the search does not call a function that it sees to change something else


class Counted(torch.autograd.Function):
    """Counts how often a backward pass comes through, the user's and the library's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        note(1)
        return grads[0]


class Model(nn.Module):
    """With layers on both axes of its input, which shapes can't tell apart where both are of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.flipped = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x) + self.flipped(x.transpose(0, 1)).transpose(0, 1)
        return self.two(Counted.apply(h.tanh()))


def numbers(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().flatten(1).sum(1).mean()


def passes_of_steps(model: nn.Module, shapes: list[tuple[int, ...]]) -> list[int]:
    found = []
    with FisherMonitor(model):
        for shape in shapes:
            PASSES.clear()
            x = torch.randn(shape).double()
            numbers(model(x), torch.zeros(*shape[:2], 3).double()).backward()
            found.append(len(PASSES))
    return found


def searched_in(model: nn.Module, shapes: list[tuple[int, ...]]) -> list[int]:
    """The numbers of the steps that took more than the user's pass."""
    return [number for number, passes in enumerate(passes_of_steps(model, shapes), 1) if passes > 1]


def test_a_steady_step_has_the_users_pass_alone() -> None:
    """One seed, and one more pass for each digit of a sample's number, ever more rarely: a gate may open meanwhile."""
    assert passes_of_steps(Model().double(), [(5, 5, 4)] * 6) == [3, 3, 3, 1, 3, 1]


def test_graphs_of_another_kind_are_searched_again() -> None:
    model = Model().double()
    assert searched_in(model, [(5, 5, 4)] * 4) == [1, 2, 3]
    assert searched_in(model, [(5, 5, 4)] * 4) == [1], "a second monitor knows what the first found out"
    assert searched_in(Model().double(), [(5, 5, 4)] * 4) == [1, 2, 3], "another model shares nothing with it"


def test_more_samples_take_more_passes() -> None:
    """33 samples have two digits to the base of 32."""
    assert passes_of_steps(Model().double(), [(32, 32, 4)])[0] == 1 + 2
    assert passes_of_steps(Model().double(), [(33, 33, 4)])[0] == 1 + 3


@pytest.mark.parametrize("shape", [(5, 5, 4), (33, 33, 4)], ids=str)
def test_what_is_found_is_right(shape: tuple[int, ...]) -> None:
    model = Model().double()
    x, y = torch.randn(shape).double(), torch.randn(*shape[:2], 3).double()
    with FisherMonitor(model, batch_axis=None, per_sample=True) as monitor:
        numbers(model(x), y).backward()
    # A sample alone would be transposed with nothing, so that the loop over samples is over those of one forward.
    losses = (model(x) - y).square().flatten(1).sum(1)
    for name, p in model.named_parameters():
        t = torch.stack([torch.autograd.grad(loss, p, retain_graph=True)[0].square().sum() for loss in losses])
        assert_equal(torch.tensor(monitor.per_sample[name].to_numpy()), t, monitor.trace * len(x))


def test_the_search_draws_nothing_of_the_users_random_numbers() -> None:
    model = Model().double()
    x = torch.randn(5, 5, 4).double()
    before = torch.get_rng_state()
    with FisherMonitor(model):
        model(x).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_hooks_of_the_user_see_the_users_pass_only() -> None:
    model, seen = Model().double(), []
    x = torch.randn(5, 5, 4).double().requires_grad_()
    x.register_hook(lambda grad: seen.append("input"))
    model.one.weight.register_hook(lambda grad: seen.append("weight"))
    model.one.register_full_backward_hook(lambda *_: seen.append("module"))
    with FisherMonitor(model):
        h = model(x)
        h.register_hook(lambda grad: seen.append("output"))
        h.retain_grad()
        assert not seen
        h.sum().backward()
    assert sorted(seen) == ["input", "module", "output", "weight"]
    torch.testing.assert_close(h.grad, torch.ones_like(h))


def test_outputs_that_show_no_samples_are_refused_with_a_remedy() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Flatten(0))
    with (
        FisherMonitor(model),
        pytest.raises(CurvatureError, match=r"5 samples.*can't be found out.*\(75,\).*sample_of="),
    ):
        model(torch.randn(5, 5, 4))


class Selected(nn.Module):
    """A matrix of zeros and ones says which sample gets which row, and a parameter meets them after several steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.offset = nn.Linear(4, 4), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, matrix: Tensor) -> Tensor:
        offset = self.offset
        for _ in range(4):
            offset = (offset * 1.1).tanh()
        return matrix @ (self.layer(x).tanh() + offset).pow(3)


def test_where_numbers_decide_each_graph_but_the_first_is_looked_through_once(searches: list[int]) -> None:
    """The first is looked through once more for each step of the climb from the parameter that the first look did not foresee."""
    model, x = Selected().double(), torch.randn(5, 4).double()
    looks = []
    with FisherMonitor(model, "sum", per_sample=True) as monitor:
        for step in range(6):
            searches.clear()
            matrix = torch.eye(5).double().roll(step, 0)
            model(x, matrix).pow(2).sum().backward()
            looks.append(len(searches))
    assert looks[0] > 3
    assert looks[2:] == [1] * 4
    for name, p in model.named_parameters():
        each = [torch.autograd.grad(model(x, matrix)[n].pow(2).sum(), p)[0].square().sum() for n in range(5)]
        assert_equal(torch.tensor(monitor.per_sample[name].to_numpy()[-5:]), torch.stack(each), monitor.trace)


class OfOneChannel(nn.Module):
    """Attention by mistake among samples, of what a norm over a single channel has made the same for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.qkv = nn.Linear(4, 4), nn.LayerNorm(1), nn.Linear(1, 3, bias=False)
        self.last = nn.Linear(4, 2)
        nn.init.constant_(self.norm.bias, 0.7)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x).tanh()
        q, k, v = self.qkv(self.norm(h[..., None])).unbind(-1)
        return self.last((h + (q @ k.T).softmax(-1) @ v).sin())


def test_nothing_is_searched_in_a_steady_step_for_a_norm_that_lets_nothing_back(searches: list[int]) -> None:
    model, x = OfOneChannel().double(), torch.randn(5, 4).double()
    looks = []
    with FisherMonitor(model, "sum", per_sample=True) as monitor:
        for _ in range(8):
            searches.clear()
            model(x).pow(2).sum().backward()
            looks.append(len(searches))
    assert [looks[3], *looks[5:]] == [0] * 4
    for name, p in model.named_parameters():
        each = [torch.autograd.grad(model(x[n : n + 1]).pow(2).sum(), p)[0].square().sum() for n in range(5)]
        assert_equal(torch.tensor(monitor.per_sample[name].to_numpy()[-5:]), torch.stack(each), monitor.trace)
