"""Which run of the model a call of a module belongs to, and how many samples a run has."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles import assert_equal, per_sample_squared_norms, total, trace
from problems._base import Forward
from torch_secorder import FisherMonitor
from torch_secorder.batch_axis.count import counted
from torch_secorder.batch_axis.told import NOTHING, Told
from torch_secorder.errors import CurvatureError


def numbers(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().flatten(1).sum(1).mean()


def assert_traces(monitor: FisherMonitor, expected: dict[str, Tensor]) -> None:
    report, everything = monitor.report(), total(trace(expected))
    for name, t in expected.items():
        assert_equal(torch.tensor(report.loc[name, "fisher_trace"]), t.mean(), everything, torch.float64)


# How many samples


@pytest.mark.parametrize(
    ("shapes", "axis", "n"),
    [
        ([(5, 3)], 0, 5),
        ([(5, 3)], 1, 3),
        ([(1, 7), (5, 7)], 0, 5),  # position ids that all samples share
        ([(1, 7), (1, 3)], 0, 1),
        ([(5, 3), (2, 2)], 0, 5),  # a mask of something else comes after what it masks
        ([(), (4,)], 0, 4),
        ([(3,)], 1, None),
        ([], 0, None),
    ],
    ids=str,
)
def test_the_batch_size_of_inputs(shapes: list[tuple[int, ...]], axis: int, n: int | None) -> None:
    assert counted(Told(inputs=axis), tuple(map(torch.zeros, shapes)), {}).n == n


def test_the_batch_size_of_nested_inputs() -> None:
    assert counted(NOTHING, ("text", None), {"more": {"ids": [torch.zeros(1, 2), (torch.zeros(6, 2),)]}}).n == 6


def test_the_batch_size_beside_a_tensor_without_elements() -> None:
    assert counted(NOTHING, (torch.zeros(5, 3), {"more": torch.zeros(0, 3)}), {}).n == 5
    assert counted(NOTHING, (torch.zeros(0, 3), {"more": torch.zeros(5, 3)}), {}).n == 0
    assert counted(NOTHING, (torch.zeros(1, 3), torch.zeros(0, 3)), {}).n == 0


# Which run


class Nested(nn.Module):
    """Calls itself, as trees do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        h = self.layer(x).tanh()
        return self(h, depth - 1) + h if depth else h


def test_a_model_that_calls_itself() -> None:
    """Two calls of the model are one batch or two, and what the outer one does after the inner one belongs to neither."""
    model, x, y = Nested().double(), torch.randn(5, 4).double(), torch.randn(5, 4).double()
    with FisherMonitor(model), pytest.raises(CurvatureError, match=r"reached two calls of the model.*repeated_calls"):
        numbers(model(x), y).backward()
    with (
        FisherMonitor(model, repeated_calls="same"),
        pytest.raises(CurvatureError, match=r"the loss reaches it by another way than through what the model returns"),
    ):
        numbers(model(x), y).backward()


def test_a_model_inside_of_another_each_with_a_monitor() -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    outer = Forward(lambda m, x: m.last(m.inner(x)), inner=inner, last=nn.Linear(4, 3)).double()
    x, y = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    expected = per_sample_squared_norms(outer, numbers, x, y)
    with FisherMonitor(outer) as all_of_it, FisherMonitor(inner) as part:
        numbers(outer(x), y).backward()
    assert_traces(all_of_it, expected)
    assert_traces(part, {name.removeprefix("inner."): t for name, t in expected.items() if name.startswith("inner")})


def test_forwards_of_several_sizes_that_are_differentiated_in_another_order() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    batches = [(torch.randn(n, 4).double(), torch.randn(n, 3).double()) for n in (5, 2, 7)]
    with FisherMonitor(model) as monitor:
        losses = [numbers(model(x), y) for x, y in batches]
        for index in (1, 2, 0):
            losses[index].backward()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert_traces(monitor, per_sample_squared_norms(model, numbers, x, y))


def test_calls_of_another_thread_are_another_run() -> None:
    """A thread that is in the middle of a forward while this one has a whole step."""
    started, go_on = threading.Event(), threading.Event()

    def waits(m: Any, x: Tensor) -> Tensor:
        h = m.one(x)
        if len(x) == 2:
            started.set()
            assert go_on.wait(60)
        return m.two(h.tanh())

    model = Forward(waits, one=nn.Linear(4, 4), two=nn.Linear(4, 3)).double()
    slow, quick = ((torch.randn(n, 4).double(), torch.randn(n, 3).double()) for n in (2, 5))
    with FisherMonitor(model) as monitor:
        other = threading.Thread(target=lambda: numbers(model(slow[0]), slow[1]).backward())
        other.start()
        assert started.wait(60)
        numbers(model(quick[0]), quick[1]).backward()
        go_on.set()
        other.join()
    x, y = (torch.cat(parts) for parts in zip(slow, quick, strict=True))
    go_on.set()
    assert_traces(monitor, per_sample_squared_norms(model, numbers, x, y))


def test_a_part_of_the_model_called_between_two_of_its_runs() -> None:
    """Nothing shows which samples it is of, so that it is refused where it is called, and the next step counts."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    with FisherMonitor(model) as monitor:
        numbers(model(x), y).backward()
        with pytest.raises(CurvatureError, match=r"Linear '0' was called outside of a call of the monitored model"):
            model[0](x)
        with torch.no_grad():
            model[0](x)
        numbers(model(x), y).backward()
    assert monitor.n_samples == 10
    assert_traces(monitor, per_sample_squared_norms(model, numbers, x, y))


def test_a_run_that_raises_half_way_is_no_part_of_the_next() -> None:
    """Calls that it made would count as calls of the run after it."""
    broken: list[bool] = []

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.layer(x).tanh()
        if broken:
            raise ZeroDivisionError
        return m.layer(h)

    model = Forward(forward, layer=nn.Linear(4, 4)).double()
    x, y = torch.randn(5, 4).double(), torch.randn(5, 4).double()
    with FisherMonitor(model) as monitor:
        broken.append(True)
        with pytest.raises(ZeroDivisionError):
            model(x[:3])
        broken.clear()
        numbers(model(x), y).backward()
    assert_traces(monitor, per_sample_squared_norms(model, numbers, x, y))
