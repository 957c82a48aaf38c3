"""Several threads, and data that other processes load."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from faults.subjects import EMPIRICAL, batch, expected, loss_fn
from faults.subjects import model as drawn
from model_state import assert_unchanged, state
from oracles import assert_equal, exact_fisher, total
from torch_secorder import FisherMonitor, fisher_report, generalized_fisher_trace
from torch_secorder.errors import CurvatureError


def model() -> nn.Module:
    """Without a table that each forward rewrites, which no two threads can run at once."""
    subject = drawn()
    subject.table.max_norm = None
    return subject


def at_once(*work: Callable[[], object]) -> None:
    """Run each in a thread of its own, all starting together; what one raises is raised here."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(work))

    def run(one: Callable[[], object]) -> None:
        try:
            start.wait()
            one()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


TURNS = 12


@pytest.mark.filterwarnings("ignore:most of the work")
@pytest.mark.parametrize("way", EMPIRICAL)
def test_two_models_in_two_threads(way: str) -> None:
    def work(n: int) -> Callable[[], None]:
        subject, data = model(), batch(n, seed=n)
        right = expected(subject, data)

        def run() -> None:
            for _ in range(TURNS):
                assert_equal(EMPIRICAL[way](subject, data).double(), right, right, torch.float64)

        return run

    at_once(work(4), work(5))


@pytest.mark.filterwarnings("ignore:most of the work")
def test_one_model_analyzed_in_several_threads() -> None:
    """Each sees its own calls only; what changes the model for a while waits for its turn."""
    subject = model()
    before = state(subject)
    x, _ = batch(3, seed=3)
    fisher = total({name: t.mean() for name, t in exact_fisher(subject, x).items()})

    def work(way: str, n: int) -> Callable[[], None]:
        data = batch(n, seed=n)
        right = expected(subject, data)

        def run() -> None:
            for _ in range(TURNS):
                assert_equal(EMPIRICAL[way](subject, data).double(), right, right, torch.float64)

        return run

    def generalized() -> None:
        for _ in range(TURNS):
            assert_equal(generalized_fisher_trace(subject, subject(x), None).double(), fisher, fisher, torch.float64)

    def plain() -> None:
        """Somebody who only runs the model, forward and backward."""
        for n in range(4 * TURNS):
            inputs, targets = batch(3 + n % 3)
            torch.autograd.grad(loss_fn(subject(inputs), targets), [subject.position])

    at_once(work("fisher_report", 4), work("empirical_fisher_trace", 5), generalized, plain)
    assert_unchanged(before, subject)


def test_one_monitor_of_a_model_that_several_threads_train() -> None:
    subject = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    data = [(torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))) for n in (3, 4, 5)]
    with FisherMonitor(subject) as alone:
        for x, y in data * TURNS:
            loss_fn(subject(x), y).backward()

    def work(x: Tensor, y: Tensor) -> Callable[[], None]:
        def run() -> None:
            for _ in range(TURNS):
                loss_fn(subject(x), y).backward()

        return run

    with FisherMonitor(subject) as monitor:
        at_once(*(work(x, y) for x, y in data))
    assert monitor.n_samples == alone.n_samples == 12 * TURNS
    assert_equal(monitor.trace, alone.trace, alone.trace, torch.float64)


DISTURBED = [  # what a monitor says of the passes of another thread
    "is not the sum of what the model's samples contribute",
    "by a way that nothing accounts for",
    "but no call of this Model was seen inside the block",
    "was called outside of a call of the monitored model",  # since the hooks came while the model was running
]


def test_monitors_of_one_model_in_two_threads() -> None:
    """Either sees the gradients of the other's passes in the parameters they share, and says so, if they come at once."""
    subject = model()
    right = expected(subject)
    seen: list[Tensor] = []
    refused: list[str] = []

    def run() -> None:
        for _ in range(TURNS):
            try:
                seen.append(EMPIRICAL["monitor"](subject))
            except CurvatureError as error:
                refused.append(str(error))

    at_once(run, run)
    run()  # alone, which nothing disturbs
    assert len(seen) + len(refused) == 3 * TURNS
    assert len(seen) >= TURNS
    for text in refused:
        assert re.search("|".join(DISTURBED), text), text
    for trace in seen:
        assert_equal(trace, right, right, torch.float64)


# Workers


class Samples(Dataset):  # type: ignore[type-arg]
    def __init__(self, broken: int | None = None):
        self.x, self.y = batch(24)
        self.broken = broken

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, n: int) -> Any:
        if n == self.broken:
            raise ZeroDivisionError
        return self.x[n], self.y[n]


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader_workers(workers: int) -> None:
    """Also with the model's hooks on when the workers fork."""
    subject = model()
    right = expected(subject, batch(24))
    table = fisher_report(subject, loss_fn, DataLoader(Samples(), 8, num_workers=workers), progress=False)
    assert_equal(torch.tensor(table.fisher_trace.sum()), right, right, torch.float64)
    with FisherMonitor(subject) as monitor:
        for x, y in DataLoader(Samples(), 8, num_workers=workers):
            loss_fn(subject(x), y).backward()
    assert_equal(monitor.trace, right, right, torch.float64)


def test_an_exception_in_a_worker() -> None:
    subject = model()
    before = state(subject)
    with FisherMonitor(subject) as monitor, pytest.raises(ZeroDivisionError):
        for x, y in DataLoader(Samples(broken=20), 8, num_workers=1):
            loss_fn(subject(x), y).backward()
    assert monitor.n_samples == 16
    subject.zero_grad()
    with pytest.raises(ZeroDivisionError):
        fisher_report(subject, loss_fn, DataLoader(Samples(broken=20), 8, num_workers=1), progress=False)
    assert_unchanged(before, subject)
