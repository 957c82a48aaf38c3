"""Monitors merge, and their state is saved and loaded."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from monitor.classifier import (
    REDUCTIONS,
    assert_report,
    assert_same_report,
    backward,
    batch,
    classifier,
    norms,
)
from oracles import (
    assert_equal,
)
from torch_secorder import FisherMonitor
from torch_secorder.errors import CurvatureError


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_merging_pools_the_samples(reduction: str) -> None:
    model, batches = classifier(), [batch(5), batch(3), batch(2)]
    options: dict[str, Any] = {"reduction": reduction, "diagonal": True, "per_sample": True}
    parts = []
    for x, y in batches:
        with FisherMonitor(model, **options) as part:
            backward(model, x, y, reduction)
        parts.append(part)
    with FisherMonitor(model, **options) as whole:
        for x, y in batches:
            backward(model, x, y, reduction)
    before = parts[1].report()
    merged = parts[0].merge(parts[1])
    assert merged is parts[0]
    merged.merge(parts[2])
    assert_same_report(merged.report(), whole.report())
    assert_same_report(merged.report(by="module"), whole.report(by="module"))
    assert_same_report(parts[1].report(), before)
    pd.testing.assert_frame_equal(merged.per_sample, whole.per_sample, rtol=1e-12)
    for name, diagonal in whole.diagonal.items():
        assert_equal(merged.diagonal[name], diagonal, whole.trace)


def test_merging_with_an_empty_monitor_changes_nothing() -> None:
    model, data = classifier(), batch()
    with FisherMonitor(model) as monitor:
        backward(model, *data)
    before = monitor.report()
    assert_same_report(monitor.merge(FisherMonitor(model)).report(), before)
    assert_same_report(FisherMonitor(model).merge(monitor).report(), before)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: FisherMonitor(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()),
            r"2\.weight|shape",
        ),
        (lambda: FisherMonitor(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()), r"[12]\.(weight|bias)"),
        (lambda: FisherMonitor(classifier(), reduction="sum"), r"reduction"),
    ],
    ids=["shapes", "names", "reduction"],
)
@pytest.mark.parametrize("how", ["merge", "load_state_dict"])
def test_merging_or_loading_what_does_not_fit_raises(
    other: Callable[[], FisherMonitor], message: str, how: str
) -> None:
    model, data = classifier(), batch()
    with FisherMonitor(model) as monitor:
        backward(model, *data)
    before, stranger = monitor.report(), other()
    with pytest.raises(CurvatureError, match=message):
        monitor.merge(stranger) if how == "merge" else monitor.load_state_dict(stranger.state_dict())
    assert_same_report(monitor.report(), before)


@pytest.mark.parametrize("kind", ["diagonal", "per_sample"])
def test_merging_one_kind_with_another_raises_or_keeps_what_both_have(kind: str) -> None:
    model, data = classifier(), batch()
    monitors = []
    for options in ({kind: True}, {}):
        with FisherMonitor(model, **options) as monitor:
            backward(model, *data)
        monitors.append(monitor)
    with pytest.raises(CurvatureError, match=kind):
        monitors[0].merge(monitors[1])


def test_a_round_trip_through_the_state_dict() -> None:
    model, first, second = classifier(), batch(5), batch(3)
    options = {"diagonal": True, "per_sample": True}
    with FisherMonitor(model, **options) as monitor:
        backward(model, *first)
    buffer = io.BytesIO()
    torch.save(monitor.state_dict(), buffer)
    buffer.seek(0)
    restored = FisherMonitor(model, **options)
    restored.load_state_dict(torch.load(buffer))
    assert_same_report(restored.report(), monitor.report())
    assert_same_report(restored.report(by="type"), monitor.report(by="type"))
    for m in (monitor, restored):
        with m:
            backward(model, *second)
    assert_report(restored, norms(model, first, second))
    assert_same_report(restored.report(by="module"), monitor.report(by="module"))
    pd.testing.assert_frame_equal(restored.per_sample, monitor.per_sample)
    assert all(torch.equal(restored.diagonal[name], d) for name, d in monitor.diagonal.items())


def test_a_state_dict_does_not_change_any_more() -> None:
    model, first, second = classifier(), batch(5), batch(3)
    with FisherMonitor(model, diagonal=True) as monitor:
        backward(model, *first)
        saved, before = monitor.state_dict(), monitor.report()
        backward(model, *second)
    other = FisherMonitor(model, diagonal=True)
    other.load_state_dict(saved)
    assert_same_report(other.report(), before)
    with other:
        backward(model, *second)
    again = FisherMonitor(model, diagonal=True)
    again.load_state_dict(saved)
    assert_same_report(again.report(), before)
