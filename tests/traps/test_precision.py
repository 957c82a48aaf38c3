"""Traps 12 and 13: half precision, and sums that cancel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracles import assert_equal, per_sample_squared_norms, total, trace
from problems._base import Forward
from torch_secorder import FisherMonitor, fisher_report, fisher_results
from traps.exactness import numbers

# 12. Half precision


def language_model() -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(11, 16), nn.Embedding(6, 16)
            self.body = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
            self.gain = nn.Parameter(torch.ones(16))
            self.head = nn.Linear(16, 11, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.body(self.words(ids) + self.places(torch.arange(ids.shape[1]))) * self.gain)

    return Model()


@contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    with torch.autocast("cpu", dtype):
        yield


@pytest.mark.parametrize("n", [1, 3])
def test_trap_12_a_layer_on_data_and_on_a_parameter_whose_cast_is_shared(n: int) -> None:
    """Autocast casts a weight once for all of its uses, so that what arrives at the cast is both uses' gradient."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.layer(x).tanh() @ m.layer(m.table).float()

    model, x = Forward(forward, layer=nn.Linear(4, 4)), torch.randn(n, 3, 4)
    model.table = nn.Parameter(torch.randn(4, 4))

    def losses() -> Tensor:
        with autocast(torch.bfloat16):
            return model(x).float().square().sum((1, 2))

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)

    expected = {name: torch.zeros(()).double() for name, _ in model.named_parameters()}
    for loss in losses():
        for (name, _), g in zip(model.named_parameters(), gradients(loss), strict=True):
            expected[name] += g.double().square().sum() / n
    with FisherMonitor(model) as monitor:
        losses().mean().backward()
    for name, value in expected.items():
        torch.testing.assert_close(float(monitor.report().loc[name, "fisher_trace"]), float(value), rtol=3e-2, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 4096.0])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_trap_12_autocast_and_scaled_losses(dtype: torch.dtype, scale: float, backward_inside: bool) -> None:
    model, ids, y = language_model(), torch.randint(11, (5, 6)), torch.randint(11, (5, 6))

    def loss(rows: slice) -> Tensor:
        with autocast(dtype):
            outputs = model(ids[rows])
        return F.cross_entropy(outputs.float().transpose(1, 2), y[rows])

    expected = {name: torch.zeros(()).double() for name, _ in model.named_parameters()}
    for n in range(5):
        model.zero_grad()
        (loss(slice(n, n + 1)) * scale).backward()
        for name, p in model.named_parameters():
            expected[name] += (p.grad.double() / scale).square().sum() / 5
    with FisherMonitor(model, loss_scale=scale) as monitor:
        if backward_inside:
            with autocast(dtype):
                (loss(slice(None)) * scale).backward()
        else:
            (loss(slice(None)) * scale).backward()
    for name, value in expected.items():
        found = float(monitor.report().loc[name, "fisher_trace"])
        assert found == pytest.approx(float(value), rel=1e-2, abs=1e-5 * float(total(expected))), name


def test_trap_12_a_grad_scaler() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(6, 4), torch.randn(6, 3)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.0), torch.amp.GradScaler("cpu", init_scale=2.0**12)
    expected = total(trace(per_sample_squared_norms(model, numbers, x, y)))
    with FisherMonitor(model, loss_scale=scaler.get_scale) as monitor:
        for part in (slice(0, 2), slice(2, 6)):
            scaler.scale(numbers(model(x[part]), y[part])).backward()
            scaler.step(optimizer)
            scaler.update(2.0**10)
    assert float(monitor.trace) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_trap_12_a_model_in_half_precision_neither_overflows_nor_underflows(dtype: torch.dtype) -> None:
    model = language_model().to(dtype)
    ids, y = torch.randint(11, (5, 6)), torch.randint(11, (5, 6))

    def loss(scale: float, rows: slice) -> Tensor:
        return F.cross_entropy(model(ids[rows]).float().transpose(1, 2), y[rows]) * scale

    for scale in (2.0**-6, 1.0, 2.0**9):
        expected = torch.zeros(()).double()
        for n in range(5):
            model.zero_grad()
            loss(scale, slice(n, n + 1)).backward()
            expected += sum((p.grad.double() / scale).square().sum() for p in model.parameters()) / 5
        with FisherMonitor(model, loss_scale=scale) as monitor:
            loss(scale, slice(None)).backward()
        assert monitor.trace.dtype in (torch.float32, torch.float64)
        assert float(monitor.trace) == pytest.approx(float(expected), rel=5e-2)


# 13. Cancellation


def test_trap_13_gradients_that_nearly_cancel() -> None:
    """Two positions with opposite gradients and nearly equal inputs, in a layer, and between two uses of a tied weight."""
    torch.manual_seed(0)
    layer = nn.Linear(24, 20, bias=False)
    x = torch.randn(4, 1, 24).repeat(1, 2, 1)
    x[:, 1] += 1e-2 * torch.randn(4, 24)
    model = Forward(lambda m, x: m.layer(x[:, :1]) - F.linear(x[:, 1:], m.layer.weight), layer=layer)
    y = torch.randn(4, 1, 20)

    def linear(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs * targets).flatten(1).sum(1).mean()

    expected = trace(per_sample_squared_norms(model, linear, x, y))
    with FisherMonitor(model, per_sample=True) as monitor:
        linear(model(x), y).backward()
    assert (monitor.per_sample >= 0).all(axis=None)
    assert_equal(
        torch.tensor(monitor.report().loc["layer.weight", "fisher_trace"]), expected["layer.weight"], 0, torch.float32
    )


def test_trap_13_gradients_that_cancel_in_a_weight_that_is_transposed_first() -> None:
    """A report differentiates for the layers' outputs only, so that the transpose gives nothing while its pass is under way."""
    model = Forward(
        lambda m, x: (m.first(x).tanh() @ m.second.weight.t().contiguous()).diff(dim=1).squeeze(1),
        first=nn.Linear(6, 24),
        second=nn.Linear(24, 20, bias=False),
    ).double()
    x, y = torch.randn(4, 1, 6).double().repeat(1, 2, 1), torch.randint(20, (4,))
    x[:, 1] += 1e-5 * torch.randn(4, 6).double()
    expected = per_sample_squared_norms(model, F.cross_entropy, x, y)
    everything = total(trace(expected))
    found = fisher_results(model, F.cross_entropy, (x, y), progress=False, per_sample=True).per_sample
    for name, t in expected.items():
        assert_equal(torch.tensor(found[name].to_numpy()), t, everything, torch.float64)


@pytest.mark.parametrize("seed", [10, 15, 26])  # of numbers whose rounding is above the usual bound
def test_trap_13_a_gradient_that_vanishes_is_amplified_rounding(seed: int) -> None:
    """The norm of equal numbers divides by the root of its eps. A bias before it has a gradient of zero, which is rounded."""
    torch.manual_seed(seed)
    model = Forward(
        lambda m, x: m.h(m.n(m.c(x[:, None]).mean(1).tanh().mT).mT[:, 0]),
        c=nn.Conv2d(1, 3, 3, padding=1),
        n=nn.GroupNorm(2, 4),
        h=nn.Linear(4, 3),
    )
    x = torch.zeros(4, 2, 4)
    x[0, 0] = torch.randn(4)
    y = torch.randint(3, (4,))
    found = fisher_report(model, F.cross_entropy, (x, y), progress=False)["fisher_trace"]
    expected = trace(per_sample_squared_norms(model.double(), F.cross_entropy, x.double(), y))
    # What is left of the bias's gradient is 2e-3 of the others', and they are rounded to 6e-8, times 316 for the eps. How much of
    # that comes about depends on the processor: 2e-4 of the trace on some, 6e-4 on a GPU.
    bias = float(expected.pop("c.bias"))
    assert found.pop("c.bias") == pytest.approx(bias, rel=2e-3)
    assert_equal(torch.tensor(found.to_numpy()), torch.stack(list(expected.values())), total(expected), torch.float32)


class Ranking(nn.Module):
    """Which of two items is preferred, by embeddings that a fixed graph has mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(4, 3), nn.Embedding(5, 3)
        mixed = torch.rand(9, 9)
        self.register_buffer("graph", mixed / mixed.sum(1, keepdim=True))

    def forward(self, users: Tensor, better: Tensor, worse: Tensor) -> Tensor:
        table = torch.cat([self.users.weight, self.items.weight])
        users_table, items_table = (table + self.graph @ table).split([4, 5])
        return (users_table[users] * items_table[better]).sum(1) - (users_table[users] * items_table[worse]).sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_trap_13_a_sample_whose_whole_gradient_cancels(dtype: torch.dtype) -> None:
    """The pair of an item with itself has no gradient but rounding, which differs in the batch and alone."""
    model = Ranking().to(dtype)
    inputs = (torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1, 2, 0, 4, 3]), torch.tensor([1, 0, 3, 2, 3]))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (F.softplus(-outputs) * targets).mean()

    y = torch.rand(5, dtype=dtype) + 0.5
    with FisherMonitor(model) as monitor:
        outputs = model(*inputs)
        found = loss(outputs, y)
        monitor.verify(found)
        found.backward()
    report = fisher_report(model, loss, (inputs, y), progress=False)
    expected = trace(per_sample_squared_norms(model.double(), loss, inputs, y.double()))
    for name, value in expected.items():
        for one in (report, monitor.report()):
            assert_equal(torch.tensor(one.fisher_trace[name]), value, total(expected), dtype)
