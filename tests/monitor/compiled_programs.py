"""Programs that are compiled in every way, with a backend that counts, and the loop they are held against."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch._dynamo.backends.common import aot_autograd

from oracles import assert_equal, per_sample_squared_norms
from torch_secorder import FisherMonitor
from traps.exactness import numbers

N = 5
WAYS = ["wrapper", "in place", "layer", "function", "step"]


class Backend:
    """A backend that compiles nothing and counts what it is asked for; on request the backward pass is compiled too."""

    def __init__(self, traces_backward: bool) -> None:
        self.compiled = self.runs = 0
        self.compile = aot_autograd(fw_compiler=self._boxed) if traces_backward else self._plain

    def _plain(self, graph: Any, inputs: object) -> Callable[..., Any]:
        self.compiled += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph(*args)

        return run

    def _boxed(self, graph: Any, inputs: object) -> Callable[..., Any]:
        return make_boxed_func(self._plain(graph, inputs))

    def counts(self) -> tuple[int, int]:
        return self.compiled, self.runs


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.linear(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.weight = Block(), nn.Parameter(torch.randn(3, 6))
        self.function: Any = nn.functional.linear

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.block(x), self.weight)


def product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T


class Program:
    """A model, the way in which it is compiled, and the steps of a training loop."""

    def __init__(self, how: str, traces_backward: bool = True) -> None:
        torch.manual_seed(0)
        self.how, self.backend = how, Backend(traces_backward)
        self.model = Model().double()
        self.call: Callable[[Tensor], Any] = self.model
        self.batches = [(torch.randn(N, 4).double(), torch.randn(N, 3).double()) for _ in range(12)]
        self.plain = copy.deepcopy(self.model)
        self.plain.function = product

    def compile(self) -> None:
        if self.how == "wrapper":
            self.call = torch.compile(self.model, backend=self.backend.compile)
        elif self.how == "in place":
            self.model.compile(backend=self.backend.compile)
        elif self.how == "layer":
            self.model.block.compile(backend=self.backend.compile)
        elif self.how == "function":
            self.model.function = torch.compile(product, backend=self.backend.compile)
        self.loss = torch.compile(self._loss, backend=self.backend.compile) if self.how == "step" else self._loss

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        return numbers(self.call(x), y)

    def step(self, number: int) -> None:
        self.model.zero_grad()
        self.loss(*self.batches[number]).backward()

    def evaluate(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self.call(self.batches[-1][0])
        self.model.train()

    def expected(self, numbers_of_steps: list[int]) -> dict[str, Tensor]:
        found = [per_sample_squared_norms(self.plain, numbers, *self.batches[number]) for number in numbers_of_steps]
        return {name: torch.cat([one[name] for one in found]) for name in found[0]}

    def require_exact(self, monitor: FisherMonitor, numbers_of_steps: list[int]) -> None:
        expected = self.expected(numbers_of_steps)
        assert monitor.n_samples == N * len(numbers_of_steps)
        for name, t in expected.items():
            actual = torch.tensor(monitor.report().loc[name, "fisher_trace"], dtype=torch.float64)
            assert_equal(actual, t.mean(), monitor.trace)


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    assert eval_frame._stance.stance == "default"
    yield
    assert eval_frame._stance == eval_frame.DynamoStance(), "the stance afterwards is the user's"
    torch._dynamo.reset()


def stance() -> str:
    return eval_frame._stance.stance
