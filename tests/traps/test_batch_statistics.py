"""Trap 7: batch statistics that no module announces, in functions and in code that torch.jit has scripted or traced."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracles import assert_equal, per_sample_squared_norms, total, trace
from problems._base import Forward
from torch_secorder import FisherMonitor, fisher_report
from torch_secorder.errors import CoupledSamplesError, CurvatureError
from traps.exactness import assert_exact, drawn, numbers

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit", "ignore:Converting a tensor to a Python boolean", "ignore:most of"
)


def normalized(h: Tensor) -> Tensor:
    return F.batch_norm(h, None, None, training=True)


def of(operation: Callable[[Tensor], Tensor], width: int = 4) -> nn.Module:
    """A model with an operation between two layers."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.last(operation(m.first(x)).tanh().flatten(1))

    return Forward(forward, first=nn.Linear(5, 4), last=nn.Linear(width, 3))


@pytest.mark.parametrize(
    ("operation", "shape", "width"),
    [
        (normalized, (6, 5), 4),
        (normalized, (6, 4, 5), 16),  # as many channels as features
        (lambda h: torch.cat([normalized(part) for part in h.chunk(2)]), (6, 5), 4),
        (lambda h: normalized(h.flatten(0, 1)).unflatten(0, h.shape[:2]), (6, 3, 5), 12),
    ],
    ids=["features", "channels", "parts of a batch", "positions folded into it"],
)
def test_trap_07_batch_statistics_of_a_function_are_refused(
    operation: Callable[[Tensor], Tensor], shape: tuple[int, ...], width: int
) -> None:
    model, x, y = drawn(of(operation, width), *shape)
    with (
        pytest.raises(CoupledSamplesError, match=r"statistics of the whole batch.*model\.eval\(\)"),
        FisherMonitor(model),
    ):
        numbers(model(x), y).backward()
    with pytest.raises(CurvatureError, match="statistics of the whole batch"):
        fisher_report(model, numbers, (x, y), progress=False)


def by_hand(h: Tensor) -> Tensor:
    """Statistics of each sample's channels, as torch itself takes them: the samples are among the channels."""
    return normalized(h.reshape(1, -1, h.shape[2])).view(h.shape)


@pytest.mark.parametrize("samples", [1, 4, 6])
@pytest.mark.parametrize(
    "operation",
    [
        F.instance_norm,
        by_hand,
        lambda h: normalized(h.flatten(0, 1).mT).mT.unflatten(0, h.shape[:2]),
        lambda h: torch.stack([normalized(one) for one in h]),
        lambda h: h * normalized(torch.linspace(0, 1, 16).view(4, 4).to(h)),
    ],
    ids=["instance norm", "by hand", "transposed", "each sample by itself", "a table"],
)
def test_trap_07_statistics_of_single_samples_are_exact(operation: Callable[[Tensor], Tensor], samples: int) -> None:
    model, x, y = drawn(of(operation, 16), samples, 4, 5)
    assert_exact(model, x, y)


def test_trap_07_running_statistics_of_a_function_are_exact() -> None:
    """Also after a step of the same kind of graph was refused."""
    training = [True]
    model, x, y = drawn(
        of(lambda h: F.batch_norm(h, torch.zeros(4).to(h), torch.ones(4).to(h), training=training[0])), 6, 5
    )
    with FisherMonitor(model) as monitor:
        with pytest.raises(CoupledSamplesError):
            numbers(model(x), y).backward()
        training[0] = False
        numbers(model(x), y).backward()
        training[0] = True
        with pytest.raises(CoupledSamplesError):
            numbers(model(x), y).backward()
    training[0] = False
    expected = trace(per_sample_squared_norms(model, numbers, x, y))
    for name, value in expected.items():
        assert_equal(torch.tensor(monitor.report().loc[name, "fisher_trace"]), value, total(expected), torch.float64)


@pytest.mark.parametrize("inside", [False, True], ids=["the model", "a part of it"])
def test_trap_07_batch_statistics_of_scripted_code_are_refused(inside: bool) -> None:
    """Also when torch has made one node of all that the code does."""
    plain, x, y = drawn(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval(), 6, 5)
    scripted = torch.jit.script(copy.deepcopy(plain).train())
    model = nn.Sequential(scripted) if inside else scripted
    for _ in range(4):
        numbers(model(x), y).backward()
    refused = pytest.raises(CoupledSamplesError, match=r"BatchNorm1d '1', which is in training mode.*model\.eval\(\)")
    with refused, FisherMonitor(model):
        model(x)
    model.eval()
    plain[1].load_state_dict({name[2:]: value for name, value in scripted.state_dict().items() if name[0] == "1"})
    expected = trace(per_sample_squared_norms(plain.eval(), numbers, x, y))
    for _ in range(4):
        with FisherMonitor(model) as monitor:
            numbers(model(x), y).backward()
        for value, row in zip(expected.values(), monitor.report()["fisher_trace"], strict=True):
            assert_equal(torch.tensor(row, dtype=torch.float64), value, total(expected), torch.float64)


def test_trap_07_a_trace_of_training_stays_one_in_eval_mode() -> None:
    """What a trace has recorded does not change with the mode."""
    plain, x, y = drawn(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval(), 6, 5)
    model = torch.jit.trace(plain.train(), x, check_trace=False)
    model.eval()
    with pytest.raises(CoupledSamplesError, match="statistics of the whole batch"), FisherMonitor(model):
        numbers(model(x), y).backward()


@pytest.mark.parametrize(
    "layer", [lambda: nn.GRU(5, 4, batch_first=True), lambda: nn.Linear(5, 4)], ids=["GRU", "linear"]
)
def test_scripted_models_are_exact_before_and_after_torch_has_fused_them(layer: Callable[[], nn.Module]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm, self.last = layer(), nn.LayerNorm(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            return self.last(torch.relu(self.norm(h[0] if isinstance(h, tuple) else h)).mean(1))

    plain, x, y = drawn(Model(), 6, 3, 5)
    expected = trace(per_sample_squared_norms(plain, numbers, x, y))
    model = torch.jit.script(copy.deepcopy(plain))
    for _ in range(4):
        with FisherMonitor(model) as monitor:
            numbers(model(x), y).backward()
        report = monitor.report()
        for name, value in expected.items():
            assert_equal(torch.tensor(report.loc[name, "fisher_trace"]), value, total(expected), torch.float64)
