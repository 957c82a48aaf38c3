"""NaN and infinite gradients in one sample of a batch: counted, reported, skipped or raised, and nobody else's business."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expectations import expectation
from model_state import assert_same_gradients, gradients
from oracles import assert_equal, per_sample_gradients, squared_norms
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report
from torch_secorder.errors import CurvatureError, NonFiniteError

Case = Callable[[], tuple[nn.Module, Tensor]]
N, BAD = 5, 3
CASES: dict[str, Case] = {
    "linear": lambda: (nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(N, 4)),
    "positions": lambda: (nn.Sequential(nn.Linear(4, 40), nn.Flatten(), nn.Linear(1200, 3)), torch.randn(N, 30, 4)),
    "convolution": lambda: (
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(48, 3)),
        torch.randn(N, 2, 6, 6),
    ),
    "norm": lambda: (nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)), torch.randn(N, 4)),
    "recurrent": lambda: (Last(), torch.randn(N, 5, 4)),
}


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][:, -1]


def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.mse_loss(outputs, targets, reduction="sum") / len(outputs)


def spoil(x: Tensor, how: str, value: float) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The batch with a bad input in one sample, or a loss that gives this sample a bad gradient."""
    if how == "input":
        x = x.clone()
        x[BAD].flatten()[0] = value
        return x, lambda outputs: outputs

    def bad(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad[BAD].flatten()[0] = value
        return grad

    def watched(outputs: Tensor) -> Tensor:
        outputs.register_hook(bad)
        return outputs

    return x, watched


everywhere = [
    pytest.mark.parametrize("name", CASES),
    pytest.mark.parametrize("how", ["input", "gradient"]),
    pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str),
]


def refusal(name: str, how: str, value: float, options: dict[str, Any]) -> str:
    """What a monitor that skips bad samples says where it can't skip one alone."""
    if how == "gradient":
        return ""
    if name == "recurrent" and math.isnan(value):
        return "in the first batch in which it was looked for where the model has its samples"
    if name in ("linear", "recurrent") and math.isinf(value) and options:
        return "became infinite half-way through the backward pass, after .* had been added to the diagonal"
    return ""


def in_every_case(test: Any) -> Any:
    for mark in everywhere:
        test = mark(test)
    return test


@in_every_case
@pytest.mark.parametrize("options", [{}, {"diagonal": True, "per_sample": True}], ids=["plain", "everything"])
def test_one_bad_sample_is_skipped_and_the_others_are_exact(
    name: str, how: str, value: float, options: dict[str, Any]
) -> None:
    net, x = CASES[name]()
    net, x, y = net.double(), x.double(), torch.randn(N, 3, dtype=torch.float64)
    rest = [n for n in range(N) if n != BAD]
    good = per_sample_gradients(net, loss_fn, x[rest], y[rest])
    norms = squared_norms(good)
    total = sum(t.mean() for t in norms.values())
    bad, watched = spoil(x, how, value)
    refused = refusal(name, how, value, options)
    with FisherMonitor(net, nonfinite="skip", **options) as monitor, expectation(refused):
        loss_fn(watched(net(bad)), y).backward()
    if refused:
        assert monitor.n_samples == 0
        return
    report = monitor.report()
    assert (report.attrs["n_samples"], report.attrs["n_skipped"]) == (N - 1, 1)
    for row, t in norms.items():
        assert_equal(torch.tensor(report.loc[row, "fisher_trace"]), t.mean(), total, torch.float64)
        if options:
            assert_equal(torch.tensor(monitor.per_sample[row].to_numpy()), t, total, torch.float64)
            assert_equal(monitor.diagonal[row], good[row].square().mean(0), total, torch.float64)


@in_every_case
def test_one_bad_sample_raises_and_harms_nothing(name: str, how: str, value: float) -> None:
    net, x = CASES[name]()
    net, x, y = net.double(), x.double(), torch.randn(N, 3, dtype=torch.float64)
    bad, watched = spoil(x, how, value)
    loss_fn(watched(net(bad)), y).backward()
    plain = gradients(net)
    net.zero_grad()
    with FisherMonitor(net) as monitor:
        with pytest.raises(NonFiniteError, match=rf"(?s)sample {BAD}\b.*nonfinite=|first batch"):
            loss_fn(watched(net(bad)), y).backward()
        assert_same_gradients(gradients(net), plain)
        loss_fn(net(x), y).backward()
    expected = sum(t.mean() for t in squared_norms(per_sample_gradients(net, loss_fn, x, y)).values())
    assert_equal(monitor.trace, expected, expected, torch.float64)
    assert "n_skipped" not in monitor.report().attrs
    if how == "input":
        with pytest.raises(CurvatureError, match=r"finite"):
            empirical_fisher_trace(net, loss_fn, bad, y)
        with pytest.raises(CurvatureError, match=r"finite"):
            fisher_report(net, loss_fn, (bad, y), progress=False)


def test_skipped_samples_add_up_over_passes_and_merges() -> None:
    net, x = CASES["linear"]()
    y = torch.randn(N, 3)
    bad, _ = spoil(x, "input", math.nan)
    monitors = [FisherMonitor(net, nonfinite="skip") for _ in range(2)]
    for monitor in monitors:
        with monitor:
            for inputs in (bad, x, bad):
                loss_fn(net(inputs), y).backward()
    assert monitors[0].merge(monitors[1]).report().attrs["n_skipped"] == 4
    assert monitors[0].n_samples == 6 * N - 4


def test_a_bad_sample_is_skipped_where_an_earlier_batch_showed_where_samples_are() -> None:
    net, x = CASES["recurrent"]()
    net, x, y = net.double(), x.double(), torch.randn(N, 3, dtype=torch.float64)
    bad, _ = spoil(x, "input", math.nan)
    rest = [n for n in range(N) if n != BAD]
    with FisherMonitor(net, nonfinite="skip", per_sample=True) as monitor:
        for inputs in (x, bad):
            loss_fn(net(inputs), y).backward()
    for row, t in squared_norms(per_sample_gradients(net, loss_fn, x, y)).items():
        assert_equal(
            torch.tensor(monitor.per_sample[row].to_numpy()), torch.cat([t, t[rest]]), monitor.trace, torch.float64
        )
