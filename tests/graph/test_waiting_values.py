"""Values that several nodes take: their gradients are pulled back once, and the numbers are those of one way for each node."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from oracles import assert_equal, per_sample_squared_norms, total, trace
from torch_secorder import FisherMonitor, fisher_report
from torch_secorder.graph.chain_flow import ChainFlow
from torch_secorder.graph.uses import BatchFreeValue
from torch_secorder.per_sample import Dense
from torch_secorder.recording.batch import SampleBatch
from torch_secorder.recording.waiting_values import WaitingValue, add_up
from traps.exactness import numbers

N, STEPS, WIDTH = 4, 6, 3
UNCHECKED = (4, 6, 7, 8)  # the steps among the first ones in which no sums are checked


class Recurrence(nn.Module):
    """A decay and a normalized matrix are computed once, and each step takes them; the matrix is used as it is, too."""

    def __init__(self) -> None:
        super().__init__()
        self.decay, self.mix = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.start, self.shared = nn.Parameter(torch.randn(WIDTH)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        decay, mix = -self.decay.exp(), self.mix / self.mix.norm()
        factor = decay.exp()
        state = self.start.expand(len(x), -1)
        common = self.shared(self.start)  # a call that all samples share
        for step in range(x.shape[1]):
            state = (state * factor + x[:, step] @ mix + decay + common).tanh()
        return state @ self.mix


@pytest.fixture
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Recurrence().double(), torch.randn(N, STEPS, WIDTH).double(), torch.randn(N, WIDTH).double()


@pytest.fixture
def flows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For each flow down a chain, how many samples it was for."""
    found: list[int] = []
    call = ChainFlow.__call__
    monkeypatch.setattr(ChainFlow, "__call__", lambda self, grads: (found.append(len(grads)), call(self, grads))[1])
    return found


def assert_exact_in(monitor: FisherMonitor, expected: dict[str, Tensor]) -> None:
    """The latest samples of a monitor are those of the loop."""
    for name, t in expected.items():
        found = torch.tensor(monitor.per_sample[name].to_numpy())[-len(t) :]
        assert_equal(found, t, total(trace(expected)) * len(t), torch.float64)


def test_every_step_is_exact_and_a_value_is_pulled_back_once(
    problem: tuple[nn.Module, Tensor, Tensor], flows: list[int]
) -> None:
    model, x, y = problem
    expected = per_sample_squared_norms(model, numbers, x, y)
    with FisherMonitor(model, per_sample=True) as monitor:
        for step in range(1, 9):
            flows.clear()
            numbers(model(x), y).backward()
            assert_exact_in(monitor, expected)
            # Of the decay, of what is made of that, of the matrix, and of the call that all samples share.
            assert len(flows) == 4 or step not in UNCHECKED


@pytest.mark.parametrize("keeps", ["diagonal", "activations"])
def test_other_quantities_are_exact(problem: tuple[nn.Module, Tensor, Tensor], keeps: str) -> None:
    model, x, y = problem
    expected = trace(per_sample_squared_norms(model, numbers, x, y))
    with FisherMonitor(model, **{keeps: True}) as monitor:
        for _ in range(5):
            numbers(model(x), y).backward()
    for name, value in expected.items():
        assert_equal(torch.tensor(monitor.report().loc[name, "fisher_trace"]), value, total(expected), torch.float64)
    if keeps == "diagonal":
        for name, entries in monitor.diagonal.items():
            assert_equal(entries.sum(), expected[name], total(expected), torch.float64)


def test_the_report_is_exact(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = problem
    expected = trace(per_sample_squared_norms(model, numbers, x, y))
    table = fisher_report(model, numbers, [(x, y)] * 5, progress=False)
    for name, value in expected.items():
        assert_equal(torch.tensor(table.loc[name, "fisher_trace"]), value, total(expected), torch.float64)


def asked_for(*names: str) -> Callable[[nn.Module, Tensor], None]:
    def differentiate(model: nn.Module, loss: Tensor) -> None:
        torch.autograd.grad(loss, [p for name, p in model.named_parameters() if not names or name in names])

    return differentiate


@pytest.mark.parametrize("differentiate", [asked_for(), lambda model, loss: loss.backward(retain_graph=True)])
def test_other_ways_to_differentiate_are_exact(
    problem: tuple[nn.Module, Tensor, Tensor], differentiate: Callable[[nn.Module, Tensor], None]
) -> None:
    model, x, y = problem
    expected = per_sample_squared_norms(model, numbers, x, y)
    with FisherMonitor(model, per_sample=True) as monitor:
        for _ in range(5):
            differentiate(model, numbers(model(x), y))
            assert_exact_in(monitor, expected)


def test_two_calls_of_the_same_samples_are_exact(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = problem
    both = lambda outputs, targets: numbers(outputs, targets) + outputs.sum(1).mean()  # noqa: E731
    named = dict(model.named_parameters())
    each = [both(model(one) * model(one.flip(1)), target) for one, target in zip(x[:, None], y[:, None], strict=True)]
    rows = [torch.autograd.grad(loss, list(named.values())) for loss in each]
    squares = [torch.stack([grad.square().sum() for grad in grads]) for grads in zip(*rows, strict=True)]
    with FisherMonitor(model, per_sample=True, repeated_calls="same") as monitor:
        for _ in range(5):
            both(model(x) * model(x.flip(1)), y).backward()
            assert_exact_in(monitor, dict(zip(named, squares, strict=True)))


def test_a_second_pass_through_a_graph_counts_its_samples_again(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = problem
    expected = per_sample_squared_norms(model, numbers, x, y)
    with FisherMonitor(model, per_sample=True, repeated_calls="new") as monitor:
        for _ in range(5):
            loss = numbers(model(x), y)
            loss.backward(retain_graph=True)
            assert_exact_in(monitor, expected)
            loss.backward()
            assert_exact_in(monitor, expected)


def test_gradients_in_which_uses_cancel_are_exact() -> None:
    class Difference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.rest = nn.Parameter(torch.randn(WIDTH)), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            scale = self.scale.exp()
            return self.rest(x) + (x[:, :WIDTH] * scale - x.flip(1) * scale)

    torch.manual_seed(0)
    model, x, y = Difference().double(), torch.randn(N, WIDTH).double(), torch.randn(N, WIDTH).double()
    x = x + 1e-3 * x.flip(1)
    expected = per_sample_squared_norms(model, numbers, x, y)
    with FisherMonitor(model, per_sample=True) as monitor:
        for _ in range(6):
            numbers(model(x), y).backward()
            assert_exact_in(monitor, expected)


def test_what_waits_is_a_copy() -> None:
    waiting, value, grads = dict[object, WaitingValue](), BatchFreeValue((WIDTH,), []), torch.ones(N, WIDTH)
    add_up(waiting, SampleBatch(N), None, value, Dense(grads), "add")  # type: ignore[arg-type]
    grads.zero_()
    add_up(waiting, SampleBatch(N), None, value, Dense(torch.ones(N, WIDTH)), "add")  # type: ignore[arg-type]
    assert torch.equal(waiting.pop(value.key).total, torch.full((N, WIDTH), 2.0))
