"""The fused LSTM: gates from oneDNN's workspace or computed again, in place or for a graph, the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles import per_sample_squared_norms
from torch_secorder import FisherMonitor
from torch_secorder.autograd import onednn
from torch_secorder.autograd.onednn import gates_in_workspace, left_by_backward
from torch_secorder.rules.recurrent import _Layer

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {"input_size": 3, "hidden_size": 4},
    "no bias": {"input_size": 5, "hidden_size": 7, "bias": False},
    "a width that is padded": {"input_size": 9, "hidden_size": 33},
    "a width that would be a multiple of 256": {"input_size": 12, "hidden_size": 64},
    "reverse": {"input_size": 3, "hidden_size": 20, "bidirectional": True},
}
SIZES = [(6, 5), (1, 5), (6, 1), (40, 3)]


def fused(n: int = 5, t: int = 6, state: bool = False, **options: Any) -> Any:
    """What the node of an LSTM's last direction has saved."""
    return copied(node_of(n, t, state, **options))


def copied(node: Any) -> Any:
    """Something with what a node has saved."""
    names = [name for name in dir(node) if name.startswith("_saved")]
    return SimpleNamespace(name=node.name, **{name: getattr(node, name) for name in names})


def node_of(n: int = 5, t: int = 6, state: bool = False, **options: Any) -> Any:
    """The node of an LSTM's last direction."""
    torch.manual_seed(0)
    body = nn.LSTM(**options)
    directions = 2 if body.bidirectional else 1
    given = tuple(torch.randn(directions, n, body.hidden_size) for _ in range(2)) if state else None
    node = body(torch.randn(t, n, body.input_size), given)[0].grad_fn
    while node.name() != "MkldnnRnnLayerBackward0":
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        if not parents or parents[-1].name() == "torch::autograd::AccumulateGrad":
            pytest.skip("no oneDNN in this build")
        node = parents[-1]
    return node


def run(node: Any, grads: tuple[Tensor | None, ...], monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the node holds when it has run, as if it had just done so."""
    node(*grads)
    ran = copied(node)
    monkeypatch.setattr(onednn, "current_node", lambda: ran)
    return ran


def gradients(node: Any) -> tuple[Tensor | None, ...]:
    """Of the outputs, the last hidden state and the last cell."""
    torch.manual_seed(1)
    return tuple(torch.randn(node._saved_result0.shape[start:]) for start in (0, 1, 1))


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize(("t", "n"), SIZES)
@pytest.mark.parametrize("name", LAYERS)
def test_kept_gates_are_those_that_are_computed(name: str, t: int, n: int, state: bool) -> None:
    layer = _Layer(fused(n, t, state, **LAYERS[name]))
    with torch.no_grad():
        kept = gates_in_workspace(layer._node)
        assert kept is not None
        torch.testing.assert_close(kept, layer._gates(), rtol=1e-4, atol=1e-5)
        assert layer._ends_with_ours(kept)
        assert layer._factors(kept)[2]


@pytest.mark.parametrize(
    "given", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize(("t", "n"), SIZES)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_the_same_for_a_graph_and_in_place(name: str, t: int, n: int, given: tuple[bool, ...]) -> None:
    node = fused(n, t, True, **LAYERS[name])
    grads = tuple(g if wanted else None for g, wanted in zip(gradients(node), given, strict=True))
    before = [None if g is None else g.clone() for g in grads]
    expected = _Layer(node).gate_gradients(grads)
    assert expected.requires_grad
    with torch.no_grad():
        found = _Layer(node).gate_gradients(grads)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-6)
    for g, same in zip(grads, before, strict=True):
        assert g is None or torch.equal(g, same)  # type: ignore[arg-type]


def shifted(workspace: Tensor) -> Tensor:
    return workspace.roll(4)


def cut(workspace: Tensor) -> Tensor:
    return workspace[:8]


def swapped(workspace: Tensor) -> Tensor:
    """Input gates where cell gates are expected: the cells are the same."""
    gates = workspace.view(torch.float32)[: 6 * 5 * 16].view(6, 5, 4, 4)
    gates[:, :, [0, 2]] = gates[:, :, [2, 0]]
    return workspace


def others_first(workspace: Tensor) -> Tensor:
    """Steps before samples, instead of after: the last gates are in their place."""
    gates = workspace.view(torch.float32)[: 6 * 5 * 16].view(6, 5, 16)
    gates.copy_(gates.clone().transpose(0, 1).reshape(6, 5, 16))
    return workspace


@pytest.mark.parametrize("change", [torch.zeros_like, shifted, cut, swapped, others_first])
def test_a_workspace_of_another_layout_is_not_believed(change: Callable[[Tensor], Tensor]) -> None:
    node = fused(**LAYERS["plain"])
    with torch.no_grad():
        expected = _Layer(node).gate_gradients(gradients(node))
        node._saved_result3 = change(node._saved_result3.clone())
        layer = _Layer(node)
        kept = gates_in_workspace(layer._node)
        assert kept is None or not layer._ends_with_ours(kept) or not layer._factors(kept)[2]
        torch.testing.assert_close(layer.gate_gradients(gradients(node)), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "given", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize(("t", "n"), SIZES)
@pytest.mark.parametrize("name", LAYERS)
def test_what_the_node_leaves_behind_gives_the_same_gradients(
    name: str, t: int, n: int, given: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = node_of(n, t, True, **LAYERS[name])
    grads = tuple(g if wanted else None for g, wanted in zip(gradients(node), given, strict=True))
    with torch.no_grad():
        expected = _Layer(node).gate_gradients(grads)
        layer = _Layer(run(node, grads, monkeypatch))
        left = left_by_backward(layer._node)
        assert (left is None) == (t == 1)
        if left is not None:
            kept = gates_in_workspace(layer._node)
            assert kept is not None
            found = layer._at_once(kept, left, grads)
            assert found is not None
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def assert_not_believed(layer: _Layer, grads: Any, expected: Tensor) -> None:
    """What was left behind can be read, is found to be wrong, and the answer is right."""
    left, kept = left_by_backward(layer._node), gates_in_workspace(layer._node)
    assert left is not None
    assert kept is not None
    assert layer._at_once(kept, left, grads) is None
    torch.testing.assert_close(layer.gate_gradients(grads), expected, rtol=1e-4, atol=1e-6)


def test_swapped_gates_do_not_agree_with_what_the_node_leaves_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    node = node_of(**LAYERS["plain"])
    grads = gradients(node)
    with torch.no_grad():
        expected = _Layer(node).gate_gradients(grads)
        ran = run(node, grads, monkeypatch)
        swapped(ran._saved_result3)
        assert_not_believed(_Layer(ran), grads, expected)


@pytest.mark.parametrize("table", [1, 2, 4])  # from the end: gradients of cells, of hidden states (of inputs), cells
def test_what_does_not_follow_from_the_gates_is_not_believed(table: int, monkeypatch: pytest.MonkeyPatch) -> None:
    node = node_of(n=5, t=40, input_size=9, hidden_size=33)
    grads = gradients(node)
    with torch.no_grad():
        expected = _Layer(node).gate_gradients(grads)
        ran = run(node, grads, monkeypatch)
        sizes = [-(-2 * 41 * 5 * columns // 1024) * 1024 for columns in (33, 48, 48, 33)]
        start = len(ran._saved_result3) // 4 - sum(sizes[:table])
        ran._saved_result3.view(torch.float32)[start : start + sizes[table - 1]] *= 1.001
        assert_not_believed(_Layer(ran), grads, expected)


class Tagger(nn.Module):
    """Two layers, both directions, dropout between them."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.LSTM(6, 40, 2, batch_first=True, bidirectional=True, dropout=dropout)
        self.head = nn.Linear(80, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0].mean(1))


def test_a_monitored_step_gives_the_norms_of_plain_autograd() -> None:
    model, x, y = Tagger(), torch.randn(5, 37, 6), torch.arange(5) % 3
    with FisherMonitor(model, per_sample=True) as monitor:
        for _ in range(2):  # the node's workspace serves the monitor and then the node itself
            nn.CrossEntropyLoss()(model(x), y).backward()
    double = copy.deepcopy(model).double()
    expected = per_sample_squared_norms(double, nn.CrossEntropyLoss(), x.double(), y)
    for name, column in monitor.per_sample.items():
        found = torch.tensor(column.to_numpy()).view(2, 5)
        torch.testing.assert_close(found, expected[name].expand(2, 5), rtol=1e-4, atol=1e-12, check_dtype=False)


def test_dropout_between_layers_is_seen_as_it_was_drawn() -> None:
    model = Tagger(dropout=0.4)
    with FisherMonitor(model) as monitor:
        nn.CrossEntropyLoss()(model(torch.randn(1, 9, 6)), torch.tensor([1])).backward()
    found = torch.tensor(monitor.report()["fisher_trace"].to_numpy())
    expected = torch.stack([p.grad.double().square().sum() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-12)
