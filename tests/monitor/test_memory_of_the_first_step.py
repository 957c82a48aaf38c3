"""What a first step holds at once, against a bound by hand: what the forward saved, and what a look or a sum needs beside it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.live_bytes import LiveBytes
from torch_secorder import FisherMonitor, empirical_fisher_trace

N, CHANNELS, SIDE = 32, 16, 32
ACTIVATION = N * CHANNELS * SIDE**2 * 4  # bytes of what the first convolution returns, the largest tensor
# Of the second layer's, a quarter each; of a pooling, a quarter of its input, and twice as much for its indices.
SAVED = ACTIVATION * (1 + 3 / 4 + 1 / 4 + 3 / 16)
# Norms of samples, parts of products and random numbers of a look, which do not grow with the images.
BOOKKEEPING = ACTIVATION / 4


def images() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in (3, CHANNELS):
        layers += [nn.Conv2d(channels, CHANNELS, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(CHANNELS * (SIDE // 4) ** 2, 5))
    return model, torch.randn(N, 3, SIDE, SIDE), torch.randint(5, (N,))


def peak(step: Callable[[], object]) -> int:
    with LiveBytes() as live:
        step()
    return live.peak


def watched(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with FisherMonitor(model) as monitor:
        F.cross_entropy(model(x), y).backward()
    return float(monitor.trace)


def test_the_bytes_that_a_forward_keeps_are_counted() -> None:
    model, x, y = images()
    with LiveBytes() as live:
        loss = F.cross_entropy(model(x), y)
    assert SAVED <= sum(live.changes) <= SAVED + BOOKKEEPING
    del loss


def test_a_first_step_holds_two_gradients_beside_what_the_forward_saved() -> None:
    """The node that a look calls has what arrives at it and what it returns, while all that was saved is still there."""
    model, x, y = images()
    found = peak(lambda: watched(model, x, y))
    assert found <= SAVED + 2 * ACTIVATION + BOOKKEEPING


def test_a_steady_step_holds_no_more_than_a_plain_one() -> None:
    model, x, y = images()
    with FisherMonitor(model):
        for _ in range(12):  # looks become rare
            F.cross_entropy(model(x), y).backward()
        steady = peak(lambda: F.cross_entropy(model(x), y).backward())
    plain = peak(lambda: F.cross_entropy(model(x), y).backward())
    assert steady <= plain + BOOKKEEPING


@pytest.mark.parametrize("call", [1, 2])
def test_the_function_holds_no_more_than_a_plain_step(call: int) -> None:
    model, x, y = images()
    plain = peak(lambda: F.cross_entropy(model(x), y).backward())
    for _ in range(call - 1):
        empirical_fisher_trace(model, nn.CrossEntropyLoss(), x, y)
    found = peak(lambda: empirical_fisher_trace(model, nn.CrossEntropyLoss(), x, y))
    # The model gets a copy of its inputs, since it may change them in place.
    assert found <= plain + x.nbytes + BOOKKEEPING
