"""Parameters that only outputs without samples lead to: nothing is looked for again, and what arrives there is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracles import assert_equal
from torch_secorder import FisherMonitor
from torch_secorder.batch_axis.knowledge import is_due
from torch_secorder.errors import ShapeError

N = 5


class Towers(nn.Module):
    """Two towers with a scale and a bias, returned as a function says."""

    def __init__(self, returned: Callable[[Towers, Tensor, Tensor], Any]):
        super().__init__()
        self.one, self.two, self.returned = nn.Linear(4, 3), nn.Linear(4, 3), returned
        self.scale, self.bias = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Any:
        return self.returned(self, F.normalize(self.one(x)), F.normalize(self.two(x)))


def similarities(model: Towers, a: Tensor, b: Tensor) -> Any:
    return a @ b.T * model.scale.exp() + model.bias, a, b


def similarities_of_each_side(model: Towers, a: Tensor, b: Tensor) -> Any:
    similar = a @ b.T * model.scale.exp() + model.bias
    return similar, similar.T, a, b


def scale_alone(model: Towers, a: Tensor, b: Tensor) -> Any:
    return model.scale.exp() * model.bias, a, b


@pytest.mark.parametrize("returned", [similarities, similarities_of_each_side, scale_alone])
def test_a_parameter_of_outputs_without_samples_takes_no_look_between_looks(
    returned: Callable[[Towers, Tensor, Tensor], Any], searches: list[int]
) -> None:
    model, x = Towers(returned).double(), torch.randn(N, 4).double()
    looked = []
    with FisherMonitor(model, "sum", per_sample=True) as monitor:
        for step in range(1, 13):
            searches.clear()
            *_, a, b = model(x)
            (a.pow(3).sum() + b.pow(4).sum()).backward()
            looked += [step] if searches else []
    assert looked == [step for step in range(1, 13) if is_due(step)]
    monitored = monitor.per_sample[-N:]
    for name, p in model.named_parameters():
        expected = torch.zeros(N).double()
        if name.startswith(("one", "two")):
            for n in range(N):  # Each sample goes through the model alone.
                *_, a, b = model(x[n : n + 1])
                expected[n] = torch.autograd.grad(a.pow(3).sum() + b.pow(4).sum(), p)[0].square().sum()
        assert_equal(torch.tensor(monitored[name].to_numpy()), expected, monitor.trace)


class Switched(nn.Module):
    """With one kind of graph in which a parameter meets the output with samples or another one, as a switch says."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gain, self.reaches = nn.Linear(4, 3), nn.Parameter(torch.randn(3)), False
        self.register_buffer("other", torch.randn(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.layer(x)
        first, second = (self.gain, self.other) if self.reaches else (self.other, self.gain)
        return h * first, h.sum(0) * second


def test_trap_22_a_way_that_another_graph_of_the_kind_has_is_refused_once_and_found_then() -> None:
    model, x = Switched().double(), torch.randn(N, 4).double()
    with FisherMonitor(model, "sum", per_sample=True) as monitor:
        for _ in range(5):  # the sixth graph of its kind is not looked through
            model(x)[0].pow(3).sum().backward()
        model.reaches = True
        with pytest.raises(ShapeError, match="gain: the loss uses an output of the model that is computed from them"):
            model(x)[0].pow(3).sum().backward()
        model(x)[0].pow(3).sum().backward()
    assert monitor.n_samples == 6 * N
    for name, p in model.named_parameters():
        each = [torch.autograd.grad(model(x[n : n + 1])[0].pow(3).sum(), p)[0].square().sum() for n in range(N)]
        assert_equal(torch.tensor(monitor.per_sample[name].to_numpy()[-N:]), torch.stack(each), monitor.trace)
