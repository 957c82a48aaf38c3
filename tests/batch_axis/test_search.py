"""What a search asks: what is known first, then a small batch, then one pass for all that is left."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils.checkpoint import checkpoint

from torch_secorder.autograd.nodes import value_shape
from torch_secorder.batch_axis.evidence import Evidence, Unplaced
from torch_secorder.batch_axis.knowledge import PlacementCache, Wanted, is_due
from torch_secorder.batch_axis.placement import Layout, Placement
from torch_secorder.batch_axis.search import SampleSearch
from torch_secorder.batch_axis.search_pass import SearchPasses, Viewed
from torch_secorder.errors import ShapeError

N, T = 5, 3


def edge(x: Tensor) -> GradientEdge:
    return torch.autograd.graph.get_gradient_edge(x)


def seen(x: Tensor) -> Viewed:
    return edge(x), x.shape


class Steps:
    """A forward whose tensors have their samples in different places."""

    def __init__(self) -> None:
        x = torch.randn(N, T, 4, requires_grad=True)
        self.positions = torch.randn(T, 4, requires_grad=True) * 2
        self.first = x * 2
        self.folded = (self.first + self.positions).reshape(N * T, 4) * 3
        self.turned = self.folded.view(N, T, 4).transpose(0, 1) * 4
        self.unused = self.first * 5
        self.outputs = self.turned.sum(0)


def test_one_set_of_passes_places_all_tensors_of_a_graph() -> None:
    steps = Steps()
    wanted = [seen(x) for x in (steps.positions, steps.first, steps.folded, steps.turned, steps.unused)]
    assert SearchPasses([steps.outputs], 0, N).evidence(wanted) == [
        Unplaced.SHARED_BY_SAMPLES,
        Placement(0),
        Placement(0, Layout.BLOCKS),
        Placement(1),
        Unplaced.NO_GRADIENT,
    ]


def test_a_search_leaves_gradients_and_the_graph_alone() -> None:
    model, x = nn.Linear(4, 2), torch.randn(N, 4, requires_grad=True)
    h = x * 2
    outputs = model(h)
    assert SearchPasses([outputs], 0, N).evidence([seen(h), seen(outputs)]) == [Placement(0), Placement(0)]
    assert x.grad is None
    assert model.weight.grad is None
    outputs.sum().backward()
    assert x.grad is not None


def test_outputs_without_samples_show_nothing() -> None:
    loss = nn.Linear(4, 2)(torch.randn(N, 4)).sum()
    with pytest.raises(ShapeError, match="returns no differentiable tensor with as many indices on axis 0"):
        SearchPasses([loss], 0, N).evidence([seen(loss)])


def test_what_is_behind_a_re_entrant_checkpoint_is_hidden() -> None:
    x = torch.randn(N, 4, requires_grad=True)
    h = x * 2
    outputs = checkpoint(nn.Linear(4, 2), h, use_reentrant=True)
    assert SearchPasses([outputs], 0, N).evidence([seen(h), seen(outputs)]) == [Unplaced.HIDDEN, Placement(0)]


class Counted(SearchPasses):
    """Passes that note what they are asked."""

    def __init__(self, *args: object):
        super().__init__(*args)  # type: ignore[arg-type]
        self.asked: list[int] = []

    def evidence(self, wanted: Sequence[Viewed]) -> list[Evidence]:
        self.asked.append(len(wanted))
        return super().evidence(wanted)


def call(x: Tensor, name: str) -> Wanted:
    return ("call", name), edge(x), x.shape


def test_what_is_known_is_not_searched_for_again() -> None:
    placements, steps = PlacementCache(), Steps()
    passes = Counted([steps.outputs], 0, N)
    wanted = [call(steps.first, "first"), call(steps.positions, "positions")]
    for _ in range(2):
        SampleSearch(placements, N, False, lambda: passes)(wanted)
    assert passes.asked == [2]
    assert list(placements.evidence.values()) == [Placement(0), Unplaced.SHARED_BY_SAMPLES]
    placements.evidence["call", "first"] = Placement(0, Layout.INDEXED, torch.arange(N))  # of another batch
    SampleSearch(placements, N, False, lambda: passes)(wanted)
    assert passes.asked == [2, 1]


def test_a_placement_that_does_not_fit_is_searched_for_again() -> None:
    placements, steps = PlacementCache({("call", "first"): Placement(1)}), Steps()
    SampleSearch(placements, N, False, lambda: SearchPasses([steps.outputs], 0, N))([call(steps.first, "first")])
    assert placements.evidence["call", "first"] == Placement(0)


@pytest.mark.parametrize("ambiguous", [False, True])
def test_a_call_that_no_gradient_reached_is_searched_for_ever_more_rarely(ambiguous: bool) -> None:
    placements, steps = PlacementCache(), Steps()
    passes = Counted([steps.outputs], 0, N)
    graphs = []
    for graph in range(1, 11):
        before = len(passes.asked)
        SampleSearch(placements, N, ambiguous, lambda: passes)([call(steps.unused, "unused")])
        if len(passes.asked) > before:
            graphs.append(graph)
    assert graphs == [graph for graph in range(1, 11) if ambiguous or is_due(graph)]


def test_a_small_batch_is_asked_before_the_whole_graph() -> None:
    placements, steps = PlacementCache(), Steps()
    passes = Counted([steps.outputs], 0, N)

    def locate() -> None:
        placements.evidence["call", "first"] = Placement(0)

    wanted = [call(steps.first, "first"), call(steps.turned, "turned")]
    SampleSearch(placements, N, False, lambda: passes, locate)(wanted)
    assert passes.asked == [1]
    assert placements.evidence["call", "turned"] == Placement(1)


def test_a_pass_sees_what_may_be_asked_later() -> None:
    placements, steps = PlacementCache(), Steps()
    passes = Counted([steps.outputs], 0, N)
    node = steps.folded.grad_fn
    assert node is not None
    search = SampleSearch(placements, N, False, lambda: passes, look_ahead=lambda: [node])
    search([call(steps.turned, "turned")])
    later: Wanted = (("use", "weight", 1, 0), GradientEdge(node, 0), value_shape(node, 0))
    search([later])
    assert passes.asked == [2]
    assert placements.evidence[later[0]] == Placement(0, Layout.BLOCKS)
