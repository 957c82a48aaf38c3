"""A device differentiates in threads of its own, from which the loss of a pass is seen where the user's program waits for it."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_secorder import FisherMonitor
from torch_secorder.autograd.roots import roots_of_pass
from torch_secorder.errors import CoverageError


def test_the_roots_are_seen_from_a_devices_thread_beside_those_of_another_pass() -> None:
    x, seen = torch.ones(3, device="pretend", requires_grad=True), list[object]()
    other, waits, ends = torch.ones(3, requires_grad=True), threading.Event(), threading.Event()

    def wait(grad: Tensor) -> None:
        waits.set()
        ends.wait(60)

    other.register_hook(wait)
    beside = threading.Thread(target=lambda: (2 * other).sum().backward())
    beside.start()
    assert waits.wait(60)

    def look(grad: Tensor) -> None:
        seen.extend([threading.get_ident(), roots_of_pass()])

    x.register_hook(look)
    loss = (3 * x).sum()
    try:
        loss.backward()
    finally:
        ends.set()
        beside.join()
    thread, roots = seen
    assert thread != threading.get_ident()
    assert roots == [loss.grad_fn]


def test_each_loss_at_one_line_is_checked() -> None:
    model = nn.Linear(4, 3, device="pretend")
    x, y = torch.randn(5, 4, device="pretend"), torch.randint(3, (5,), device="pretend")
    with FisherMonitor(model) as monitor:
        for weight in (0, 0, 0, 1):
            loss = F.cross_entropy(model(x), y)
            if weight:
                with pytest.raises(CoverageError, match="weight penalty"):
                    (loss + model.weight.square().sum()).backward()
            else:
                loss.backward()
    assert monitor.n_samples == 15
