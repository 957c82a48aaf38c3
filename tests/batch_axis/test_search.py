"""What a search asks: what is known first, then a small batch, then one pass for all that is left."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils.checkpoint import checkpoint

from torch_secorder.autograd.nodes import value_shape
from torch_secorder.batch_axis.evidence import Evidence, Finding, Unplaced
from torch_secorder.batch_axis.knowledge import PlacementCache, Wanted, is_due
from torch_secorder.batch_axis.placement import FIRST, Layout, Placement
from torch_secorder.batch_axis.search import SampleSearch
from torch_secorder.batch_axis.search_pass import SearchPasses, Viewed
from torch_secorder.errors import ShapeError

N, T = 5, 3


def edge(x: Tensor) -> GradientEdge:
    return torch.autograd.graph.get_gradient_edge(x)


def seen(x: Tensor) -> Viewed:
    return edge(x), x.shape


def places(passes: SearchPasses, *wanted: Viewed) -> list[Evidence]:
    return [finding.evidence for finding in passes.findings(wanted)]


class Steps:
    """A forward whose tensors have their samples in different places."""

    def __init__(self) -> None:
        x = torch.randn(N, T, 4, requires_grad=True)
        self.positions = torch.randn(T, 4, requires_grad=True) * 2
        self.first = x * 2
        self.folded = (self.first + self.positions).reshape(N * T, 4) * 3
        self.turned = self.folded.view(N, T, 4).transpose(0, 1) * 4
        self.unused = self.first * 5
        self.closed = self.first * 6
        self.gate = torch.zeros(N, 1, 1)
        self.outputs = self.turned.sum(0) + (self.closed * self.gate.data).sum(1)


def test_one_set_of_passes_places_all_tensors_of_a_graph() -> None:
    steps = Steps()
    wanted = [seen(x) for x in (steps.positions, steps.first, steps.folded, steps.turned)]
    wanted += [seen(steps.closed), seen(steps.unused)]
    assert places(SearchPasses([(steps.outputs, FIRST)], N), *wanted) == [
        Unplaced.SHARED_BY_SAMPLES,
        Placement(0),
        Placement(0, Layout.BLOCKS),
        Placement(1),
        Unplaced.NO_GRADIENT,
        Unplaced.NOT_REACHED,
    ]


def test_a_search_leaves_gradients_and_the_graph_alone() -> None:
    model, x = nn.Linear(4, 2), torch.randn(N, 4, requires_grad=True)
    h = x * 2
    outputs = model(h)
    assert places(SearchPasses([(outputs, FIRST)], N), seen(h), seen(outputs)) == [Placement(0), Placement(0)]
    assert x.grad is None
    assert model.weight.grad is None
    outputs.sum().backward()
    assert x.grad is not None


def test_outputs_without_samples_show_nothing() -> None:
    loss = nn.Linear(4, 2)(torch.randn(N, 4)).sum()
    refusal = ShapeError("nothing is counted")
    with pytest.raises(ShapeError, match="nothing is counted"):
        places(SearchPasses([(loss, None)], N, not_counted=lambda: refusal), seen(loss))


def test_what_is_behind_a_re_entrant_checkpoint_is_hidden() -> None:
    x = torch.randn(N, 4, requires_grad=True)
    h = x * 2
    outputs = checkpoint(nn.Linear(4, 2), h, use_reentrant=True)
    assert places(SearchPasses([(outputs, FIRST)], N), seen(h), seen(outputs)) == [Unplaced.HIDDEN, Placement(0)]


class Counted(SearchPasses):
    """Passes that note what they are asked."""

    def __init__(self, *args: object):
        super().__init__(*args)  # type: ignore[arg-type]
        self.asked: list[int] = []
        self.silent: list[bool] = []  # whether nothing came where nothing is expected

    def agreeing(self, wanted: Sequence[Viewed], derived: Sequence[Finding], loud: Tensor) -> list[bool]:
        found = super().agreeing(wanted, derived, loud)
        self.silent.append(all(found))
        return found

    def findings(self, wanted: Sequence[Viewed]) -> list[Finding]:
        self.asked.append(len(wanted))
        return super().findings(wanted)


def call(x: Tensor, name: str) -> Wanted:
    return ("call", name), edge(x), x.shape


class Graphs:
    """Graphs of one kind, one after the other, and those of them that were looked at."""

    def __init__(self, *, ambiguous: bool = False) -> None:
        self.placements, self.steps, self._ambiguous = PlacementCache(), Steps(), ambiguous
        self.passes = Counted([(self.steps.outputs, FIRST)], N)

    def looked_at(self, wanted: Sequence[Wanted], count: int = 10) -> list[int]:
        found = []
        for graph in range(self.placements.graphs_seen + 1, self.placements.graphs_seen + count + 1):
            before = len(self.passes.asked)
            SampleSearch(self.placements, N, self._ambiguous, lambda **_: self.passes)(wanted)
            if len(self.passes.asked) > before:
                found.append(graph)
        return found


DUE = [graph for graph in range(1, 11) if is_due(graph)]


def test_what_is_known_is_examined_ever_more_rarely() -> None:
    graphs = Graphs()
    wanted = [call(graphs.steps.first, "first"), call(graphs.steps.positions, "positions")]
    assert graphs.looked_at(wanted) == DUE
    assert set(graphs.passes.asked) == {2}
    assert list(graphs.placements.evidence.values()) == [Placement(0), Unplaced.SHARED_BY_SAMPLES]


def test_a_list_of_samples_is_good_for_one_graph() -> None:
    graphs = Graphs()
    graphs.placements.graphs_seen = 5
    graphs.placements.keep(("call", "first"), Finding(Placement(0, Layout.INDEXED, torch.arange(N))))
    assert graphs.looked_at([call(graphs.steps.first, "first")], 1) == [6]


def test_what_is_not_proven_is_searched_for_until_it_is() -> None:
    graphs = Graphs()
    graphs.placements.graphs_seen = 5
    graphs.placements.keep(("call", "first"), Finding(Placement(0), proven=False))
    assert graphs.looked_at([call(graphs.steps.first, "first")], 3) == [6]


def test_a_placement_that_does_not_fit_is_searched_for_again() -> None:
    graphs = Graphs()
    graphs.placements.graphs_seen = 5
    graphs.placements.keep(("call", "first"), Finding(Placement(1)))
    assert graphs.looked_at([call(graphs.steps.first, "first")], 1) == [6]
    assert graphs.placements.evidence["call", "first"] == Placement(0)


@pytest.mark.parametrize("ambiguous", [False, True])
def test_a_call_that_no_gradient_reached_is_searched_for_ever_more_rarely(ambiguous: bool) -> None:
    """Where its shape says nothing, one pass in between shows that it is silent still."""
    graphs = Graphs(ambiguous=ambiguous)
    assert graphs.looked_at([call(graphs.steps.closed, "closed")]) == DUE
    assert graphs.passes.silent == ([True] * (10 - len(DUE)) if ambiguous else [])


@pytest.mark.parametrize("loud", range(N))
def test_a_gate_that_opens_for_one_sample_is_seen_in_the_next_graph(loud: int) -> None:
    graphs = Graphs(ambiguous=True)
    wanted = [call(graphs.steps.closed, "closed")]
    graphs.looked_at(wanted, 5)
    assert graphs.placements.evidence["call", "closed"] is Unplaced.NO_GRADIENT
    graphs.steps.gate[loud] = 1  # The graph has saved it, and the sixth is not examined.
    assert graphs.looked_at(wanted, 1) == [6]
    assert graphs.passes.silent == [True, False]
    assert graphs.placements.evidence["call", "closed"] == Placement(0)


@pytest.mark.parametrize("kind", ["call", "use"])
def test_where_no_way_leads_is_remembered_also_where_shapes_are_ambiguous(kind: str) -> None:
    graphs = Graphs(ambiguous=True)
    unused = graphs.steps.unused
    assert graphs.looked_at([((kind, "unused"), edge(unused), unused.shape)]) == DUE


def test_a_small_batch_is_asked_before_the_whole_graph() -> None:
    placements, steps = PlacementCache(graphs_seen=5), Steps()
    passes = Counted([(steps.outputs, FIRST)], N)

    def locate() -> None:
        placements.keep(("call", "first"), Finding(Placement(0)))

    wanted = [call(steps.first, "first"), call(steps.turned, "turned")]
    SampleSearch(placements, N, False, lambda **_: passes, locate)(wanted)
    assert passes.asked == [1]
    assert placements.evidence["call", "turned"] == Placement(1)


def test_a_pass_sees_what_may_be_asked_later() -> None:
    placements, steps = PlacementCache(), Steps()
    passes = Counted([(steps.outputs, FIRST)], N)
    node = steps.folded.grad_fn
    assert node is not None
    search = SampleSearch(placements, N, False, lambda **_: passes, look_ahead=lambda: [node])
    search([call(steps.turned, "turned")])
    later: Wanted = (("use", "weight", 1, 0), GradientEdge(node, 0), value_shape(node, 0))
    search([later])
    assert passes.asked == [2]
    assert placements.evidence[later[0]] == Placement(0, Layout.BLOCKS)
