"""Behind a router the host waits for the indices that nodes saved, and for the pass's end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import pretend
from routers import (
    LOOKED_AT,
    STEPS,
    back_by_an_index,
    batch,
    by_a_loop,
    by_parts,
    by_scatter,
    eager,
    in_order_of_experts,
    losses_of,
    made,
    require_same,
    with_capacity,
)
from torch_secorder import FisherMonitor

# What the routers themselves wait for, on a device. A function of the user's in one is called, whose answer is waited for, too.
OWN_WAITS = {eager: 6, in_order_of_experts: 4, back_by_an_index: 4, with_capacity: 14, by_scatter: 0, by_parts: 4 + 1}


@pytest.mark.parametrize("route", OWN_WAITS, ids=lambda route: route.__name__)
def test_on_a_device_the_host_waits_for_the_indices_and_for_the_end(route: Callable[..., Tensor]) -> None:
    model = made(route)
    expected = by_a_loop(model)
    pretend.moved(model)
    waits = []
    with FisherMonitor(model, per_sample=True) as monitor:
        for step in range(1, STEPS + 1):
            x = pretend.moved(batch(step))
            with pretend.counting() as counts:
                losses_of(model, x).mean().backward()
            waits.append(counts.waits.total())
    table = monitor.per_sample
    require_same({name: torch.from_numpy(table[name].to_numpy(copy=True)) for name in table}, expected)
    steady = [count for step, count in enumerate(waits, start=1) if step not in LOOKED_AT]
    assert steady == [OWN_WAITS[route] + 2] * len(steady)
