"""What is remembered of a model: when it is looked at again, and when it is forgotten."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from torch import nn

from torch_secorder.batch_axis.knowledge import KINDS_OF_GRAPH, ModelKnowledge, Schedule, is_due, knowledge_of
from torch_secorder.batch_axis.told import told


def test_the_schedule_is_the_1st_2nd_3rd_5th_9th_17th() -> None:
    assert [count for count in range(1, 70) if is_due(count)] == [1, 2, 3, 5, 9, 17, 33, 65]


def function() -> Callable[..., Any]:
    return lambda: None


def test_each_function_and_each_kind_of_graph_is_counted_by_itself() -> None:
    schedule, one, other = Schedule(), function(), function()
    assert [schedule.due(one, 1) for _ in range(10)] == [is_due(count) for count in range(1, 11)]
    assert [schedule.due(one, 2) for _ in range(4)] == [True, True, True, False]
    assert [schedule.due(other, 1) for _ in range(4)] == [True, True, True, False]
    schedule.restart()
    assert schedule.due(one, 1)


def test_what_cannot_be_counted_is_always_due() -> None:
    schedule = Schedule()

    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self) -> None: ...

    loss = Unhashable()
    assert all(schedule.due(loss, 1) for _ in range(10))


def test_counts_do_not_grow_with_the_kinds_of_graph() -> None:
    schedule, one = Schedule(), function()
    for fingerprint in range(10 * KINDS_OF_GRAPH):
        assert schedule.due(one, fingerprint)
    assert len(schedule._of_functions[one]._counts) <= KINDS_OF_GRAPH + 1


def test_placements_do_not_grow_either() -> None:
    knowledge = ModelKnowledge()
    for fingerprint in range(10 * KINDS_OF_GRAPH):
        knowledge.placements(fingerprint)
    assert len(knowledge._by_fingerprint) <= KINDS_OF_GRAPH + 1
    assert knowledge.placements(7) is knowledge.placements(7)
    assert knowledge.placements(7) is not knowledge.placements(8)


def test_shapes_that_misled_are_forgotten_and_not_trusted_again() -> None:
    knowledge, one = ModelKnowledge(), function()
    placements = knowledge.placements(1)
    for _ in range(4):
        due = knowledge.schedule.due(one, 1)
    assert not due
    assert knowledge.trusts_shapes
    knowledge.forget_shapes()
    assert not knowledge.trusts_shapes
    assert knowledge.placements(1) is not placements
    assert knowledge.schedule.due(one, 1)


def test_a_losss_reduction_is_remembered() -> None:
    knowledge, one = ModelKnowledge(), function()
    told: list[str | None] = []

    def find(before: str | None) -> str:
        told.append(before)
        return "sum"

    assert [knowledge.reduction(one, find) for _ in range(2)] == ["sum", "sum"]
    assert told == [None, "sum"]


def test_knowledge_lives_as_long_as_its_model() -> None:
    model = nn.Linear(2, 2)
    knowledge = knowledge_of(model)
    assert knowledge_of(model) is knowledge
    assert len({id(knowledge), id(knowledge_of(model, told(model, 1))), id(knowledge_of(model, checks=False))}) == 3
    del model
    gc.collect()
    assert knowledge_of(nn.Linear(2, 2)) is not knowledge
