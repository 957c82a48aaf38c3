"""Calls of the model that take what its earlier calls have computed: episodes of a policy, unrolled solvers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from model_state import assert_same_gradients, gradients
from monitor.classifier import assert_report
from oracles import per_sample_squared_norms
from torch_secorder import FisherMonitor
from torch_secorder.autograd.self_test import hooks_are_seen
from torch_secorder.errors import CoverageError, LifecycleError, UnsupportedError


class Policy(nn.Module):
    """One step of an episode: what it says, and the state for the next step.

    Args:
        layer: makes the state of the step and the last state.
        passes_on: whether it also returns the last state as it is, which another call has made.
        keeps: whether it keeps the state to itself instead of returning it.
    """

    def __init__(self, layer: str = "linear", *, passes_on: bool = False, keeps: bool = False) -> None:
        super().__init__()
        self.layer = {
            "linear": nn.Linear,
            "weight norm": lambda i, o: weight_norm(nn.Linear(i, o)),
            "lstm": nn.LSTMCell,
        }[layer.removeprefix("checkpointed ")](9, 5)
        self.bias, self.last = nn.Parameter(torch.randn(5)), nn.Linear(5, 3)
        self.is_checkpointed = layer.startswith("checkpointed")
        self.passes_on, self.keeps, self.kept = passes_on, keeps, torch.zeros(())

    def new_state(self, x: Tensor, state: Tensor) -> Tensor:
        both = torch.cat([x, state], 1)
        return self.layer(both, (state, state))[0] if isinstance(self.layer, nn.LSTMCell) else self.layer(both).tanh()

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        before = self.kept if self.keeps else state
        new = (
            checkpoint(self.new_state, x, before, use_reentrant=False)
            if self.is_checkpointed
            else self.new_state(x, before)
        )
        self.kept = new = new + self.bias
        return (self.last(new), *(() if self.keeps else (new,)), *((state,) if self.passes_on else ()))


class Episode(nn.Module):
    """All steps of an episode; some of its steps begin a new one, which forgets the state. Returns a number for each sample."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self.returned: list[tuple[Tensor, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        state = self.policy.kept = torch.zeros(len(x), 5, dtype=x.dtype)
        found = torch.zeros(len(x), dtype=x.dtype)
        for t in range(x.shape[1]):
            said, *others = self.policy(x[:, t], state * (x[:, t, :1] < 1))
            self.returned.append((said, *others))
            found = found + sum((1 + k) * one.square().sum(1) for k, one in enumerate((said, *others)))
            state = others[0] if others else state
        self.policy.kept = torch.zeros(())  # Nobody copies a model that holds a graph.
        return found


def mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs * targets).mean()


def norms(episode: Episode, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    episode.returned = []
    found = [per_sample_squared_norms(episode, mean, x, y) for x, y in batches]
    return {name.removeprefix("policy."): torch.cat([one[name] for one in found]) for name in found[0]}


def drawn(n: int, steps: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(n, steps, 4).double(), torch.rand(n).double()


@pytest.mark.parametrize("passes_on", [False, True], ids=["", "the last state too"])
@pytest.mark.parametrize("layer", ["linear", "weight norm", "lstm", "checkpointed linear"])
def test_a_state_that_goes_from_call_to_call(layer: str, passes_on: bool) -> None:
    episode = Episode(Policy(layer, passes_on=passes_on)).double()
    batches = [drawn(4), drawn(3), drawn(1, 5), drawn(5, 1), drawn(4, 6)]
    if layer.startswith("checkpointed") and not hooks_are_seen():
        refusal = pytest.raises(UnsupportedError, match="does not show which saved tensors have hooks")
        with refusal, FisherMonitor(episode.policy, repeated_calls="same"):
            mean(episode(batches[0][0]), batches[0][1]).backward()
        return
    with FisherMonitor(episode.policy, repeated_calls="same") as monitor:
        for x, y in batches:
            loss = mean(episode(x), y)
            monitor.verify(loss)
            loss.backward()
    mine = gradients(episode.policy)
    assert_report(monitor, norms(episode, batches))
    episode.zero_grad()
    for x, y in batches:
        mean(episode(x), y).backward()
    assert_same_gradients(mine, gradients(episode.policy))


def test_a_state_that_the_model_keeps() -> None:
    episode = Episode(Policy(keeps=True)).double()
    batches = [drawn(4), drawn(3)]
    with FisherMonitor(episode.policy, repeated_calls="same") as monitor:
        for x, y in batches:
            mean(episode(x), y).backward()
    assert_report(monitor, norms(episode, batches))


def test_parameters_between_the_calls_and_an_output_that_is_the_argument() -> None:
    """What lies between two calls belongs to the later one, which may return its argument as it is and nothing else of it."""

    class Solver(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.step = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + self.step(x).tanh(), x

    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.solver = Solver()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x, _ = self.solver(x)
                x = x * self.solver.scale
            return self.solver(x)[1].square().sum(1) + self.solver(x)[0].sum(1)

    model, (x, y) = Unrolled().double(), (torch.randn(5, 4).double(), torch.rand(5).double())
    with FisherMonitor(model.solver, repeated_calls="same") as monitor:
        mean(model(x), y).backward()
    squared = per_sample_squared_norms(model, mean, x, y)
    assert_report(monitor, {name.removeprefix("solver."): t for name, t in squared.items()})


def test_threads_count_their_nodes_from_the_beginning() -> None:
    """A thread may have the number of one that is over, and makes nodes with the same numbers."""
    episode = Episode(Policy()).double()
    batches = [drawn(4), drawn(3), drawn(4)]
    with FisherMonitor(episode.policy, repeated_calls="same") as monitor:
        for x, y in batches:
            with ThreadPoolExecutor(1) as thread:
                thread.submit(lambda x=x, y=y: mean(episode(x), y).backward()).result()  # type: ignore[misc]
    assert_report(monitor, norms(episode, batches))


def test_the_remedy_for_calls_that_follow_calls() -> None:
    """Neither without a word nor as new samples: the text of either refusal names what is exact."""
    episode, (x, y) = Episode(Policy()).double(), drawn(4)
    with FisherMonitor(episode.policy), pytest.raises(LifecycleError, match=r'two calls.*repeated_calls="same"'):
        mean(episode(x), y).backward()
    refusal = pytest.raises(CoverageError, match=r'takes what another call has computed \(pass repeated_calls="same"')
    with FisherMonitor(episode.policy, repeated_calls="new"), refusal:
        mean(episode(x), y).backward()
    with FisherMonitor(episode.policy, repeated_calls="same") as monitor:
        mean(episode(x), y).backward()
    assert_report(monitor, norms(episode, [(x, y)]))


@pytest.mark.parametrize("detach", [True, False], ids=["detached", "a pass of its own that was refused"])
def test_a_state_of_an_earlier_pass(detach: bool) -> None:
    """Truncated in time the calls have nothing to do with each other; a graph that is kept counts its samples once."""
    policy, (x, y) = Policy().double(), drawn(4, 2)
    with FisherMonitor(policy, repeated_calls="same") as monitor:
        said, state = policy(x[:, 0], torch.zeros(4, 5).double())
        mean(said.sum(1), y).backward(retain_graph=True)
        before = monitor.report()
        again = mean(policy(x[:, 1], state.detach() if detach else state)[0].sum(1), y)
        if detach:
            again.backward()
            assert monitor.n_samples == 8
        else:
            with pytest.raises(LifecycleError, match="second backward pass"):
                again.backward()
            assert monitor.report().equals(before)
