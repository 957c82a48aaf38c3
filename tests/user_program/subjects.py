"""Models that the programs train: one whose samples are plain to see, and some in which the library has to look for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracles import per_sample_squared_norms
from problems._base import Forward, randomized
from traps.exactness import Square, numbers
from traps.test_randomness import EXPERTS, Routed
from user_program.observed import Run


@dataclass(frozen=True)
class Subject:
    """A model in float64 and the shape of its batches.

    Attributes:
        plain: the model for the loop over samples, where that must not be the same one: with its own parameters' names.
    """

    name: str
    module: Callable[[], nn.Module]
    shape: tuple[int, ...]
    plain: Callable[[], nn.Module] | None = None

    def model(self) -> nn.Module:
        return randomized(self.module()).double()

    def batch(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.shape, dtype=torch.float64)
        with torch.random.fork_rng(), torch.no_grad():
            shape = self._twin()(x).shape
        return x, torch.randn(shape, dtype=torch.float64)

    def batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.batch() for _ in range(count))

    def _twin(self) -> nn.Module:
        return (self.plain or self.module)().double()

    def expect(self, run: Run, model: nn.Module, x: Tensor, y: Tensor, parameters: str = "trainable") -> None:
        """The squared norms of the pass to come, from a model with these values and none of the program's hooks."""
        run.expect(lambda: self._squared_norms(model, x, y, parameters))

    def _squared_norms(self, model: nn.Module, x: Tensor, y: Tensor, parameters: str) -> dict[str, Tensor]:
        twin = self._twin().train(model.training)
        twin.load_state_dict(model.state_dict())
        return per_sample_squared_norms(twin, numbers, x.detach(), y, parameters=parameters)

    def step(self, run: Run, model: nn.Module, x: Tensor, y: Tensor) -> None:
        """A backward pass whose samples count."""
        self.expect(run, model, x, y)
        with run.step():
            numbers(model(x), y).backward()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def steps_first(m: Any, x: Tensor) -> Tensor:
    return m.head(m.lstm(x.transpose(0, 1))[0]).transpose(0, 1)


def windows(m: Any, x: Tensor) -> Tensor:
    """As in Swin: each sample's two windows are folded into the batch, of which each layer sees twice as many rows."""
    n, t = x.shape[:2]
    h = m.one(x.unflatten(1, (2, t // 2)).flatten(0, 1)).tanh()
    return m.two(m.norm(h)).unflatten(0, (n, 2)).flatten(1, 2)


def reordered(m: Any, x: Tensor) -> Tensor:
    """Each step's samples are sorted, in an order of their own, and put back."""
    order = x[:, 0].argsort()
    h = F.linear(x[order], m.one.weight, m.one.bias).tanh()
    return m.two(h[order.argsort()] + x)


MLP = Subject("mlp", mlp, (6, 4))
SQUARE = Subject("square", lambda: Square(4), (4, 4))
STEPS_FIRST = Subject("steps first", lambda: Forward(steps_first, lstm=nn.LSTM(4, 4), head=nn.Linear(4, 3)), (5, 5, 4))
WINDOWS = Subject(
    "windows", lambda: Forward(windows, one=nn.Linear(4, 4), norm=nn.LayerNorm(4), two=nn.Linear(4, 2)), (4, 4, 4)
)
ROUTER = Subject("router", lambda: Routed(EXPERTS["linear"], "experts"), (4, 6, 6))
REORDERED = Subject("reordered", lambda: Forward(reordered, one=nn.Linear(4, 4), two=nn.Linear(4, 3)), (6, 4))
# The library looks for the samples of these through their graphs, of the last two in every step.
SEARCHED = [SQUARE, STEPS_FIRST, WINDOWS, ROUTER, REORDERED]
