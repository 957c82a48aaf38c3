"""Behind a router the host waits for the indices that nodes saved, and for the pass's end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

import pretend
import routers
from torch_secorder import FisherMonitor

# What the routers themselves wait for, on a device. A function of the user's in one is called, whose answer is waited for, too.
OWN_WAITS = {
    routers.eager: 6,
    routers.in_order_of_experts: 4,
    routers.back_by_an_index: 4,
    routers.with_capacity: 14,
    routers.by_scatter: 0,
    routers.by_parts: 4 + 1,
}


@pytest.mark.parametrize("route", OWN_WAITS, ids=lambda route: route.__name__)
def test_on_a_device_the_host_waits_for_the_indices_and_for_the_end(route: Callable[..., Tensor]) -> None:
    model = routers.made(route)
    expected = routers.by_a_loop(model)
    pretend.moved(model)
    waits = []
    with FisherMonitor(model, per_sample=True) as monitor:
        for step in range(1, routers.STEPS + 1):
            x = pretend.moved(routers.batch(step))
            with pretend.counting() as counts:
                routers.losses_of(model, x).mean().backward()
            waits.append(counts.waits.total())
    routers.require_same(routers.squared_norms(monitor), expected)
    steady = [count for step, count in enumerate(waits, start=1) if step not in routers.LOOKED_AT]
    assert steady == [OWN_WAITS[route] + 2] * len(steady)
