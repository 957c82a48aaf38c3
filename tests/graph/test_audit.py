"""What the audit asks of a graph, how it describes uses, and what it does in a steady step: nothing but walk and look up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from problems._base import Forward as Model
from torch_secorder import FisherMonitor
from torch_secorder.batch_axis.derivation import Derivation
from torch_secorder.batch_axis.knowledge import ModelKnowledge
from torch_secorder.batch_axis.placement import FIRST
from torch_secorder.capture.model_run import Forward
from torch_secorder.graph.audit import Audit
from torch_secorder.graph.call_places import Questions
from torch_secorder.graph.orders import order_of
from torch_secorder.graph.uses import ParameterUse
from torch_secorder.graph.walk import Walk
from torch_secorder.model.parameters import ParameterTable

N, T = 5, 3


def questions(outputs: Tensor, n: int, leaves: dict[Any, int] | None = None) -> Questions:
    walk = Walk([outputs], Forward(n), leaves or {})
    derivation = Derivation([(outputs, FIRST)], n, walk.other_leaves)
    return Questions.of(walk, n, order_of(walk, derivation, as_shapes_say=True))


GRAPHS: dict[str, tuple[Callable[[Tensor], Tensor], set[str]]] = {
    "plain": (lambda x: (x * 2).relu(), set()),
    "flipped": (lambda x: (x * 2).flip(0), {"reorders_samples", "ambiguous_shapes"}),
    "features flipped": (lambda x: (x * 2).flip(1), set()),
    "picked in order": (lambda x: (x * 2)[torch.arange(N)], {"reorders_samples", "ambiguous_shapes"}),
    "picked": (lambda x: (x * 2)[torch.arange(N).flip(0)], {"reorders_samples", "ambiguous_shapes"}),
    "picked of more": (
        lambda x: torch.cat([x, x[:2]])[torch.arange(N).flip(0)],
        {"reorders_samples", "ambiguous_shapes"},
    ),
    "one position picked of each": (
        # An index with a colon has a node of a whole slice before it in some versions of torch.
        lambda x: x.unsqueeze(1).expand(N, 7, 4)[torch.arange(N), torch.arange(N)],
        {"reorders_samples", "ambiguous_shapes"},
    ),
    "sliced whole": (lambda x: torch.ops.aten.slice(x * 2, 0, 0, N), set()),
    "features picked": (lambda x: torch.ops.aten.index(x * 2, [None, torch.arange(3).flip(0)]), set()),
    "as many positions as samples": (lambda x: x[:, None].expand(N, N, 4) * 2, {"ambiguous_shapes"}),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_what_a_graph_leaves_open(name: str) -> None:
    function, expected = GRAPHS[name]
    x = torch.randn(N, 4, requires_grad=True)
    asked = questions(function(x), N)
    assert {question for question, yes in asked._asdict().items() if yes} == expected | {"several_samples"}


@pytest.mark.parametrize("n", [1, 2])
def test_one_sample_has_no_order(n: int) -> None:
    model, knowledge = nn.Linear(4, 3), ModelKnowledge()
    table = ParameterTable(model)
    table.gather(model)
    Audit(table, knowledge).uses(Forward(n, placements=[FIRST]), [(model(torch.randn(n, 4)) * 2).flip(0)])
    assert [order.may_change for order in knowledge.orders.values()] == [True] * (n - 1)


def test_fingerprints_differ_by_nodes_and_by_the_pattern_of_sizes() -> None:
    def fingerprint(n: int, width: int, function: Callable[[Tensor], Tensor] = torch.relu) -> int:
        return Walk([function(torch.randn(n, width, requires_grad=True))], Forward(n), {}).fingerprint

    assert fingerprint(5, 4) == fingerprint(6, 4) == fingerprint(6, 3)
    assert len({fingerprint(5, 4), fingerprint(4, 4), fingerprint(5, 4, torch.tanh)}) == 3


def uses(model: nn.Module, outputs: Tensor) -> dict[str, ParameterUse]:
    """The uses of each parameter, all in the graph of these outputs."""
    table = ParameterTable(model)
    table.gather(model)
    found = Audit(table, ModelKnowledge()).uses(Forward(len(outputs), placements=[FIRST]), [outputs]).placed
    for use, node in found:
        use.note_node_calls(node)
    return {table.names[target]: use for use, _ in found for target in use.targets if isinstance(target, int)}


def test_uses_tell_what_their_gradients_take() -> None:
    model = nn.Module()
    model.first, model.scale = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
    model.turned, model.normed = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
    h = torch.randn(N, 4) @ model.first
    h = h * model.scale
    h = F.linear(h, model.turned)  # whose transpose the product takes
    outputs = h.tanh() @ (model.normed / model.normed.norm())
    found = uses(model, outputs)
    assert {name for name, use in found.items() if use.is_first} == {"first"}
    assert {name for name, use in found.items() if use.needs_node_calls} == {"normed"}
    assert {name for name, use in found.items() if use.permutes_entries} == {"turned", "normed"}


def test_a_steady_step_makes_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(
        lambda self, x: self.second(torch.relu(F.linear(x, self.first.weight))),
        first=nn.Linear(4, 8, bias=False),
        second=nn.Linear(8, 3),
    )
    made: list[int] = []
    plain = torch.autograd.grad

    def counted(*args: Any, **options: Any) -> Any:
        made.append(step)
        return plain(*args, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    with FisherMonitor(model):
        for step in range(1, 7):
            model(torch.randn(N + step % 2, 4)).square().sum().backward()
    assert set(made) == {1, 2, 3, 5}  # those in which what is known is examined again
