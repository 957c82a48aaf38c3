"""No graph of an earlier step is alive: neither held by the library, nor in a cycle that waits for the collector."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from garbage import uncollected
from problems._base import Forward
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report, generalized_fisher_trace
from traps.exactness import numbers
from traps.test_checkpoints import Blocks
from traps.test_precision import language_model
from user_program.hooks import layers, tensor_of
from user_program.subjects import mlp, steps_first

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


class Mark:
    """Lives in the metadata of a node, and so as long as that."""


@dataclass
class Alive:
    """Weak references to the nodes of each forward's graph and to its layers' outputs, recomputed ones too."""

    generations: list[list[weakref.ref[Any]]] = field(default_factory=list)

    def watch(self, model: nn.Module) -> None:
        model.register_forward_pre_hook(lambda module, args: self.generations.append([]))
        model.register_forward_hook(lambda module, args, output: self._mark(tensor_of(output)))
        for _, layer in layers(model):
            layer.register_forward_hook(lambda module, args, output: self._add(tensor_of(output)))

    def _add(self, thing: object) -> None:
        self.generations[-1].append(weakref.ref(thing))

    def _mark(self, output: Tensor) -> None:
        nodes, waiting = set(), [output.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in nodes or "AccumulateGrad" in node.name():  # a parameter's, not a graph's
                continue
            nodes.add(node)
            waiting += [upper for upper, _ in node.next_functions]
            mark = node.metadata["mark"] = Mark()
            self._add(mark)

    def assert_gone(self, but: int) -> None:
        """Nothing of any forward is alive, but of the last so many."""
        earlier = enumerate(self.generations[: len(self.generations) - but], 1)
        counts = {number: (sum(ref() is not None for ref in refs), len(refs)) for number, refs in earlier}
        alive = {number: f"{count} of {all_}" for number, (count, all_) in counts.items() if count}
        assert not alive, f"nodes and outputs alive after forward {len(self.generations)}, by forward: {alive}"


def classes(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.mT, targets)


def of_numbers(*shape: int) -> Callable[[nn.Module], Batch]:
    def batch(model: nn.Module) -> Batch:
        x = torch.randn(shape)
        with torch.no_grad():
            return x, torch.randn_like(model(x))

    return batch


def of_words(model: nn.Module) -> Batch:
    return torch.randint(11, (5, 6)), torch.randint(11, (5, 6))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Batch], Loss]] = {
    "mlp": (mlp, of_numbers(6, 4), numbers),
    "weight norm": (
        lambda: nn.Sequential(weight_norm(nn.Linear(4, 8)), nn.Tanh(), weight_norm(nn.Linear(8, 3))),
        of_numbers(6, 4),
        numbers,
    ),
    "lstm, steps first": (
        lambda: Forward(steps_first, lstm=nn.LSTM(4, 4), head=nn.Linear(4, 3)),
        of_numbers(5, 6, 4),
        numbers,
    ),
    "tied language model": (language_model, of_words, classes),
    "checkpoints": (partial(Blocks, 2, False), of_numbers(5, 4), numbers),
}


def trained(model: nn.Module, batch: Batch, loss_fn: Loss, alive: Alive, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model(batch[0]), batch[1]).backward()
        optimizer.step()
        alive.assert_gone(but=1)


def under_a_monitor(model: nn.Module, batch: Batch, loss_fn: Loss, alive: Alive, steps: int) -> None:
    with FisherMonitor(model):
        trained(model, batch, loss_fn, alive, steps)


def in_a_block_each(model: nn.Module, batch: Batch, loss_fn: Loss, alive: Alive, steps: int) -> None:
    monitor = FisherMonitor(model, per_sample=True, activations=True)
    for _ in range(steps):
        with monitor:
            trained(model, batch, loss_fn, alive, 1)


def in_a_report(model: nn.Module, batch: Batch, loss_fn: Loss, alive: Alive, steps: int) -> None:
    fisher_report(model, loss_fn, [batch] * steps, progress=False)


def by_the_function(model: nn.Module, batch: Batch, loss_fn: Loss, alive: Alive, steps: int) -> None:
    for _ in range(steps):
        empirical_fisher_trace(model, loss_fn, *batch)
        alive.assert_gone(but=0)


def of_outputs(model: nn.Module, batch: Batch, loss_fn: Loss, alive: Alive, steps: int) -> None:
    kind, axis = ("nll", 2) if loss_fn is classes else ("mse", 1)
    for _ in range(steps):
        generalized_fisher_trace(model, model(batch[0]), None, kind, num_samples=1, class_axis=axis)
        alive.assert_gone(but=0)


WAYS = {
    "plain": trained,  # without the library, to show that nothing else holds a graph
    "monitor": under_a_monitor,
    "a block for each step": in_a_block_each,
    "report": in_a_report,
    "function": by_the_function,
    "outputs": of_outputs,
}


def assert_no_graph_stays(way: str, name: str, steps: int) -> None:
    module, batch_of, loss_fn = MODELS[name]
    model, alive = module(), Alive()
    batch = batch_of(model)
    alive.watch(model)
    with uncollected():
        WAYS[way](model, batch, loss_fn, alive, steps)
        alive.assert_gone(but=0)
    assert len(alive.generations) >= steps
    assert all(len(refs) > 1 for refs in alive.generations)


@pytest.mark.filterwarnings("ignore:the graph of these outputs does not show")  # since a checkpoint threw it away
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_no_graph_of_an_earlier_step_is_alive(name: str, way: str) -> None:
    assert_no_graph_stays(way, name, steps=9)  # which are checked at the first, the second, the fourth and the eighth


@pytest.mark.slow  # the same over more steps than any of the library's memories holds
@pytest.mark.parametrize("way", ["monitor", "report"])
def test_no_graph_is_alive_over_300_batches_of_weight_norm(way: str) -> None:
    assert_no_graph_stays(way, "weight norm", steps=300)
