"""Cross entropy that divides by the sum of its targets' weights, against loops that take it apart by its documented formula.

A sample's share under "mean" is N times what it adds to the batch's loss, whose normalizer is the whole batch's. Two batches of
unequal weights therefore have other shares than one batch of both.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from oracles import assert_equal
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report

CLASSES = 4
WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.0], dtype=torch.float64)


class Places(nn.Module):
    """Logits (N, C), or (N, C, T) of several places that share all parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).movedim(-1, 1)


def terms(logits: Tensor, y: Tensor, loss: nn.CrossEntropyLoss) -> tuple[Tensor, Tensor]:
    """The numerator and the denominator of one sample, as torch.nn.CrossEntropyLoss documents them."""
    p, weight = logits.movedim(0, -1).log_softmax(-1), torch.ones_like(WEIGHTS) if loss.weight is None else loss.weight
    above, below = 0 * logits.sum(), torch.zeros((), dtype=torch.float64)
    for row, label in zip(p.reshape(-1, CLASSES), y.reshape(-1).tolist(), strict=True):
        if label != loss.ignore_index:
            smooth = loss.label_smoothing
            above = above - (1 - smooth) * weight[label] * row[label] - smooth / CLASSES * (weight * row).sum()
            below = below + weight[label]
    return above, below


def squared_norms(model: nn.Module, x: Tensor, y: Tensor, loss: nn.CrossEntropyLoss) -> Tensor:
    """t_{n,p}, ``[n, p]``."""
    found = [terms(one, label, loss) for one, label in zip(model(x), y, strict=True)]
    factor = len(y) / sum(below for _, below in found) if loss.reduction == "mean" else 1.0
    rows = []
    for above, _ in found:
        each = torch.autograd.grad(above * factor, list(model.parameters()), retain_graph=True, allow_unused=True)
        rows.append([torch.zeros(()).double() if g is None else g.square().sum() for g in each])
    return torch.tensor(rows, dtype=torch.float64)


def drawn(n: int, places: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(n, *places, 5, dtype=torch.float64), torch.randint(CLASSES, (n, *places))
    y.view(-1)[:CLASSES] = torch.arange(CLASSES)  # The first sample may be an ignored one, or one without a weight.
    return x, y


@pytest.mark.parametrize("places", [(), (3,)], ids=["one place", "three places"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_ignored_targets_and_smoothing(smoothing: float, reduction: str, places: tuple[int, ...]) -> None:
    model, batches = Places(), [drawn(7, places), drawn(5, places)]
    for weight, ignored in itertools.product([None, WEIGHTS], [-100, 0, 3]):
        loss = nn.CrossEntropyLoss(weight, ignore_index=ignored, label_smoothing=smoothing, reduction=reduction)
        each = [squared_norms(model, *one, loss) for one in batches]
        scale = 1.0 / 12 if reduction == "mean" else 1.0
        expected = scale * torch.cat(each).sum(0)
        with FisherMonitor(model, reduction) as monitor:
            for x, y in batches:
                value = loss(model(x), y)
                above, below = zip(*(terms(o, label, loss) for o, label in zip(model(x), y, strict=True)), strict=True)
                assert_equal(value, sum(above) / (sum(below) if reduction == "mean" else 1), value)
                value.backward()
        for report in (monitor.report(), fisher_report(model, loss, batches, progress=False)):
            found = torch.tensor(report["fisher_trace"].tolist(), dtype=torch.float64)
            assert_equal(found, expected, expected.sum())
        for one, t in zip(batches, each, strict=True):
            total = t.sum() / (len(t) if reduction == "mean" else 1)
            assert_equal(empirical_fisher_trace(model, loss, *one), total, total)


def test_two_batches_of_unequal_weights_are_not_one_batch() -> None:
    model, loss = Places(), nn.CrossEntropyLoss(WEIGHTS)
    (x, y), (z, labels) = drawn(7, ()), drawn(5, ())
    whole = squared_norms(model, torch.cat([x, z]), torch.cat([y, labels]), loss).mean(0)
    parts = torch.cat([squared_norms(model, x, y, loss), squared_norms(model, z, labels, loss)]).mean(0)
    assert float((whole - parts).abs().max()) > 1e-3 * float(whole.max())
    one = fisher_report(model, loss, (torch.cat([x, z]), torch.cat([y, labels])), progress=False)
    assert_equal(torch.tensor(one["fisher_trace"].tolist(), dtype=torch.float64), whole, whole.sum())
