"""Steps of whole models, with the loop over samples that they are held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model_state import hooks
from oracles import Inputs, assert_equal, call, per_sample_squared_norms, total, trace
from problems._base import randomized
from torch_secorder import FisherMonitor, fisher_report

Loss = Callable[[Any, Tensor], Tensor]


def numbers(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().flatten(1).sum(1).mean()


def drawn(model: nn.Module, *shape: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The model with random weights, its input and its targets, in float64."""
    model, x = randomized(model).double(), torch.randn(*shape).double()
    with torch.no_grad():
        return model, x, torch.randn_like(model(x))


def assert_exact(
    model: nn.Module, inputs: Inputs, targets: Tensor, loss_fn: Loss = numbers, report: bool = True, **options: Any
) -> FisherMonitor:
    """The monitor's traces and samples, and fisher_report's traces, are those of the loop."""
    expected = per_sample_squared_norms(model, loss_fn, inputs, targets)
    everything = total(trace(expected))
    with FisherMonitor(model, per_sample=True, **options) as monitor:
        loss_fn(call(model, inputs), targets).backward()
    for name, t in expected.items():
        assert_equal(torch.tensor(monitor.report().loc[name, "fisher_trace"]), t.mean(), everything, torch.float64)
        assert_equal(torch.tensor(monitor.per_sample[name].to_numpy()), t, everything * len(t), torch.float64)
    if report:
        assert_report_exact(model, inputs, targets, loss_fn, expected, **options)
    assert not any(hooks(model).values())
    return monitor


def assert_report_exact(
    model: nn.Module,
    inputs: Inputs,
    targets: Tensor,
    loss_fn: Loss = numbers,
    expected: dict[str, Tensor] | None = None,
    **options: Any,
) -> None:
    """fisher_report's traces are those of the loop, or of squared norms that were found already."""
    expected = expected or per_sample_squared_norms(model, loss_fn, inputs, targets)
    table = fisher_report(model, loss_fn, (inputs, targets), progress=False, **options)
    for name, t in expected.items():
        assert_equal(torch.tensor(table.loc[name, "fisher_trace"]), t.mean(), total(trace(expected)), torch.float64)


def of_one_graph(model: nn.Module, losses: Tensor) -> dict[str, Tensor]:
    """t_{n,p} from the samples' losses of one forward: the reference where another forward would draw other numbers."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = [torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True) for loss in losses]
    return {
        name: torch.stack([torch.zeros(()) if g is None else g.double().square().sum() for g in column])
        for name, column in zip(named, zip(*rows, strict=True), strict=True)
    }


class Square(nn.Module):
    """Every size is the same, so that no shape tells anything."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(n, n), nn.Embedding(n, n)
        self.offset, self.first = nn.Parameter(torch.zeros(n, n)), nn.Parameter(torch.zeros(1, 1, n))
        self.mix, self.norm, self.across = nn.Linear(n, n), nn.LayerNorm(n), nn.Linear(n, n)
        self.attention = nn.MultiheadAttention(n, 1, batch_first=False)
        self.recurrent = nn.GRU(n, n)
        self.bias = nn.Embedding(n, 1)
        self.conv = nn.Conv1d(n, n, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        steps = torch.arange(n)
        h = self.words((x * 3).long().abs() % n) + self.positions(steps) + self.offset + self.first
        h = self.mix(h).tanh() + self.across(h.transpose(1, 2)).transpose(1, 2).tanh()
        h = self.norm(h).transpose(0, 1)
        mask = self.bias((steps[:, None] - steps).abs()).squeeze(-1)
        h = h + self.attention(h, h, h, attn_mask=mask, need_weights=False)[0]
        h = h + self.recurrent(h)[0]
        h = self.conv(h.transpose(0, 1))
        return h.flatten(0, 1).tanh().unflatten(0, x.shape)
