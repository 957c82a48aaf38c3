"""Trap 22: an evidence remembered from one batch and used for another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracles import assert_equal, per_sample_squared_norms, total, trace
from problems._base import Forward, randomized
from torch_secorder import FisherMonitor, fisher_report
from traps.exactness import assert_exact, numbers


def batch(model: nn.Module, *shape: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(shape).double()
    with torch.no_grad():
        return x, torch.randn_like(model(x))


def watched_first_on(model: nn.Module, x: Tensor) -> None:
    with FisherMonitor(model):
        numbers(model(x), torch.zeros_like(model(x))).backward()


def folded(self: Any, x: Tensor) -> Tensor:
    """As many steps as features, steps first, and folded into the samples: shapes and names tell nothing."""
    steps = self.layer(x.transpose(0, 1).flatten(0, 1)).relu()
    return self.head(steps.view(x.shape[1], len(x), -1).sum(0))


def test_trap_22_a_first_batch_of_padding_but_for_one_step() -> None:
    """One row with a gradient fits blocks and turns alike."""
    model = randomized(Forward(folded, layer=nn.Linear(3, 3), head=nn.Linear(3, 2))).double()
    nn.init.constant_(model.layer.bias, -0.1)
    padding = torch.zeros(4, 3, 3).double()
    padding[0, 0] = 5 * model.layer.weight[0].detach()
    watched_first_on(model, padding)
    assert_exact(model, *batch(model, 4, 3, 3))


def gated(self: Any, x: Tensor) -> Tensor:
    """Attention over the samples behind a gate."""
    h = self.layer(x).tanh()
    return self.head(h + self.gate * ((h @ h.T).softmax(1) @ h))


def test_trap_22_a_gate_that_opens() -> None:
    """Behind the open gate samples are coupled; what is told of each output is what autograd tells of it."""
    model = Forward(gated, layer=nn.Linear(4, 4), head=nn.Linear(4, 3))
    model.gate = nn.Parameter(torch.zeros(()))
    model = model.double()
    x, y = batch(model, 6, 4)
    watched_first_on(model, x)
    with torch.no_grad():
        model.gate.fill_(0.5)
    losses = (model(x) - y).square().sum(1)
    named = dict(model.named_parameters())
    t = [torch.autograd.grad(loss, list(named.values()), retain_graph=True) for loss in losses]
    expected = {
        name: torch.stack([g.square().sum() for g in grads])
        for name, grads in zip(named, zip(*t, strict=True), strict=True)
    }
    with FisherMonitor(model) as monitor:
        numbers(model(x), y).backward()
    for name, norms in expected.items():
        found = torch.tensor(monitor.report().loc[name, "fisher_trace"])
        assert_equal(found, norms.mean(), total(trace(expected)), torch.float64)


PIECES = 6


def generated(self: Any, x: Tensor) -> Tensor:
    """A layer whose weight another one makes of its pieces' embeddings."""
    return self.head(F.linear(x, self.maker(self.pieces).reshape(9, 2)).tanh())


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_trap_22_pieces_of_a_weight_as_many_as_the_samples_of_a_later_batch(fisher: str) -> None:
    model = Forward(generated, maker=nn.Linear(4, 3), head=nn.Linear(9, 2))
    model.register_buffer("pieces", torch.randn(PIECES, 4))
    model = model.double()
    batches = [batch(model, n, 2) for n in (8, PIECES)]
    if fisher == "empirical":
        report = fisher_report(model, numbers, batches, progress=False)
        of_batches = [per_sample_squared_norms(model, numbers, *both) for both in batches]
        expected = {name: torch.cat([t[name] for t in of_batches]).mean() for name in of_batches[0]}
        for name, value in expected.items():
            found = torch.tensor(report.loc[name, "fisher_trace"])
            assert_equal(found, value, sum(expected.values()), torch.float64)
        return
    options = {"fisher": "exact", "loss_type": "mse", "progress": False}
    found = fisher_report(model, None, batches, **options)["fisher_trace"]
    alone = [
        fisher_report(model, None, (x[n : n + 1], None), **options)["fisher_trace"]
        for x, _ in batches
        for n in range(len(x))
    ]
    for name in found.index:
        expected_value = torch.tensor([one[name] for one in alone]).mean()
        assert_equal(torch.tensor(found[name]), expected_value, torch.tensor(found.sum()), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_trap_22_half_precision_inside_of_a_model_that_returns_float32(dtype: torch.dtype) -> None:
    """More samples than one pass tells apart in half precision, as many as positions."""
    n = 32
    ids, y = torch.randint(11, (2, n, n))
    model = Forward(
        lambda self, ids: self.head(self.words(ids) + self.positions(torch.arange(n))).float(),
        words=nn.Embedding(11, 8),
        positions=nn.Embedding(n, 8),
        head=nn.Linear(8, 11),
    )
    with FisherMonitor(model) as monitor:
        with torch.autocast("cpu", dtype=dtype):
            outputs = model(ids)
        F.cross_entropy(outputs.mT, y).backward()
    losses = F.cross_entropy(model(ids).mT, y, reduction="none").mean(1)
    weight = model.positions.weight
    norms = torch.stack([torch.autograd.grad(loss, weight, retain_graph=True)[0].square().sum() for loss in losses])
    found = monitor.report().loc["positions.weight", "fisher_trace"]
    assert found == pytest.approx(float(norms.mean()), rel=0.02)  # of bfloat16's own rounding


@pytest.mark.parametrize(("dtype", "coupling"), [(torch.float64, 9e-4), (torch.bfloat16, 0.08)], ids=str)
def test_trap_22_a_weak_coupling_is_not_forgiven(dtype: torch.dtype, coupling: float) -> None:
    def mixed(self: Any, x: Tensor) -> Tensor:
        h = self.layer(x)
        return self.head(h + coupling * h.mean(0))

    model = Forward(mixed, layer=nn.Linear(4, 4), head=nn.Linear(4, 3)).to(dtype)
    x = torch.randn(1, 4).to(dtype)
    x = torch.cat([x, -0.9 * x])
    y = torch.tensor([0, 1])
    with FisherMonitor(model) as monitor:
        F.cross_entropy(model(x), y).backward()
    losses = F.cross_entropy(model.double()(x.double()), y, reduction="none")
    weight = model.layer.weight
    norms = torch.stack([torch.autograd.grad(loss, weight, retain_graph=True)[0].square().sum() for loss in losses])
    rounding = {torch.float64: 1e-10, torch.bfloat16: 0.01}[dtype]  # that of the coupling is 1.5e-4 and 0.019
    assert monitor.report().loc["layer.weight", "fisher_trace"] == pytest.approx(float(norms.mean()), rel=rounding)


def beside_zeros(self: Any, x: Tensor) -> Tensor:
    """Stacked as often as there are samples, and multiplied by a weight that a layer computes; then norms of rows of zeros."""
    h = torch.einsum("lbtd,sd->slbt", torch.stack([x, x.tanh()]), self.layer(self.w)).sum(1).permute(1, 2, 0)
    return F.normalize(h @ self.v.softmax(0), dim=-1) @ self.head.T


def test_trap_22_rows_that_drown_beside_norms_of_zeros() -> None:
    """The gradients of two padded rows are 1e12 times the others; they fit samples that take turns, which labels exclude."""
    torch.manual_seed(1)
    model = Forward(beside_zeros, layer=nn.Linear(4, 4))
    for name, shape in (("w", (4, 4)), ("v", (4, 4)), ("head", (3, 4))):
        model.register_parameter(name, nn.Parameter(torch.randn(shape) / 2))
    x, y = torch.randn(2, 3, 4), torch.randint(3, (2, 3))
    x[:, 2], y[:, 2] = 0, -100
    losses = [F.cross_entropy(out, labels, reduction="sum") for out, labels in zip(model(x), y, strict=True)]
    rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    with FisherMonitor(model, reduction="sum") as monitor:
        F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").backward()
    table = monitor.report()
    for (name, _), *gs in zip(model.named_parameters(), *rows, strict=True):
        expected = torch.stack([g.double().square().sum() for g in gs]).sum()
        # Plain autograd has float32's digits in each sample's gradient.
        torch.testing.assert_close(torch.tensor(table.loc[name, "fisher_trace"]), expected, rtol=1e-4, atol=1e-9)
