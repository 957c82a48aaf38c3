"""What a monitor's sums are taken in, and how large and small numbers may be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monitor.classifier import (
    assert_report,
    backward,
    batch,
    classifier,
    cross_entropy,
    norms,
)
from oracles import (
    assert_equal,
    per_sample_gradients,
    per_sample_squared_norms,
    squared_norms,
    total,
    trace,
)
from torch_secorder import FisherMonitor
from torch_secorder.errors import CurvatureError, NonFiniteError
from torch_secorder.per_sample import Outer, gram, outer


def test_squared_norms_of_half_precision_models_do_not_overflow() -> None:
    torch.manual_seed(1)
    model = nn.Linear(4, 3).bfloat16()
    x, y = torch.randn(5, 4).bfloat16(), torch.randn(5, 3).bfloat16()
    with FisherMonitor(model) as monitor:
        nn.MSELoss()(model(x), y).backward()
    expected = trace(per_sample_squared_norms(model, nn.MSELoss(), x, y))
    assert monitor.trace.dtype in (torch.float32, torch.float64)
    assert float(monitor.trace) == pytest.approx(float(total(expected)), rel=0.05)


def test_autocast_is_seen_as_the_operations_saw_it() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3))
    x, y = torch.randn(5, 7, 16), torch.randn(5, 7, 3)

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return nn.MSELoss()(model(inputs).float(), targets)

    expected = {name: 0.0 for name, _ in model.named_parameters()}
    for n in range(5):
        model.zero_grad()
        loss(x[n : n + 1], y[n : n + 1]).backward()
        for name, p in model.named_parameters():
            expected[name] += float(p.grad.square().sum()) / 5
    with FisherMonitor(model) as monitor:
        loss(x, y).backward()
    for name, value in expected.items():
        assert monitor.report().loc[name, "fisher_trace"] == pytest.approx(value, rel=0.02), name
    assert monitor.trace.dtype in (torch.float32, torch.float64)


def test_a_layers_input_changed_in_place_before_the_backward_is_refused() -> None:
    """A frozen layer's input isn't guarded by autograd, which has no need of it."""

    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
            self.overwrite = False

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            h = self.frozen(x)
            if self.overwrite:
                x.mul_(0.5)
            return self.last(h.tanh())

    model, data = Overwrites().double(), batch()
    expected = per_sample_squared_norms(model, cross_entropy(), *data)
    model.frozen.requires_grad_(False)
    with FisherMonitor(model, parameters="all") as monitor:
        model.overwrite = True
        with pytest.raises(CurvatureError, match=r"Linear 'frozen': its input was changed in place.*out of place"):
            backward(model, *data)
        model.overwrite = False
        backward(model, *data)
    assert_report(monitor, expected)


def test_gradients_too_large_to_square_in_float32_are_refused() -> None:
    """A norm of 1e25 has a square beyond the largest number of float32."""
    model, (x, y) = classifier().float(), batch()
    with FisherMonitor(model) as monitor:
        with pytest.raises(
            NonFiniteError, match=r"samples 0, 1, 2, 3, 4 are not finite, in parameters 0\.weight, .*nonfinite="
        ):
            (cross_entropy()(model(x.float()), y) * 1e25).backward()
        backward(model, x.float(), y)
    expected = total(trace(norms(model, (x, y))))
    assert float(monitor.trace) == pytest.approx(float(expected), rel=1e-4)


def test_the_trace_is_a_scalar_tensor_without_a_graph() -> None:
    model = classifier()
    with FisherMonitor(model) as monitor:
        backward(model, *batch())
    assert monitor.trace.shape == ()
    assert not monitor.trace.requires_grad
    assert monitor.trace.dtype == torch.float64


def test_squared_norms_are_never_negative() -> None:
    """Gradients that cancel over positions: the Gram form subtracts large numbers there."""
    torch.manual_seed(0)
    model = nn.Linear(16, 16)
    x = torch.randn(4, 1, 16).repeat(1, 2, 1) * 1e3
    sign = torch.tensor([1.0, -1.0])[:, None]
    with FisherMonitor(model) as monitor:
        (model(x) * sign).sum((1, 2)).mean().backward()
    report = monitor.report()
    assert (report["fisher_trace"] >= 0).all()
    assert report.loc["weight", "fisher_trace"] < 1e-6 * float(x.square().sum())


def test_squared_norms_that_nearly_cancel_stay_accurate_in_float32() -> None:
    torch.manual_seed(0)
    model = nn.Linear(24, 20)
    x = torch.randn(4, 1, 24).repeat(1, 2, 1)
    x[:, 1] += 1e-2 * torch.randn(4, 24)
    y = torch.randn(4, 1, 20)
    weight = torch.stack([torch.ones(20), -torch.ones(20)])

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs * targets * weight.to(outputs)).sum((1, 2)).mean()

    expected = trace(squared_norms(per_sample_gradients(model, loss, x, y)))
    with FisherMonitor(model) as monitor:
        loss(model(x), y).backward()
    assert_equal(torch.tensor(monitor.report().loc["weight", "fisher_trace"]), expected["weight"], 0, torch.float32)


def test_norms_of_whole_gradients_from_their_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of .grad, in passes that check it and in those that do not."""
    model = nn.Sequential(nn.Linear(1200, 1300), nn.Tanh(), nn.Linear(1300, 1200)).double()
    found: list[Tensor | None] = []
    batch_gradient_norm = Outer.batch_gradient_norm

    def counted(form: Outer) -> Tensor | None:
        found.append(batch_gradient_norm(form))
        return found[-1]

    monkeypatch.setattr(Outer, "batch_gradient_norm", counted)
    squares = {name: 0.0 for name, _ in model.named_parameters()}
    with FisherMonitor(model) as monitor:
        for _ in range(8):
            model.zero_grad()
            x, y = torch.randn(2, 32, 1200, dtype=torch.float64)
            nn.functional.mse_loss(model(x), y).backward()
            for name, p in model.named_parameters():
                assert p.grad is not None
                squares[name] += float(p.grad.square().sum()) / 8
    assert len(found) > 2
    assert all(norm is not None for norm in found)
    for name, value in monitor.report()["grad_sq_norm"].items():
        assert value == pytest.approx(squares[str(name)], rel=1e-9)


def test_norms_of_whole_gradients_are_of_what_a_hook_makes_of_them() -> None:
    """In every pass, and not only in those that read the gradient anyway."""
    model, squares = nn.Linear(1200, 1300).double(), 0.0
    model.weight.register_hook(lambda grad: grad / 2)
    with FisherMonitor(model) as monitor:
        for _ in range(6):
            model.zero_grad()
            nn.functional.mse_loss(model(torch.randn(32, 1200).double()), torch.zeros(32, 1300).double()).backward()
            assert model.weight.grad is not None
            squares += float(model.weight.grad.square().sum()) / 6
    assert monitor.report().loc["weight", "grad_sq_norm"] == pytest.approx(squares, rel=1e-9)


class Projections(nn.Module):
    """Several layers that get the same tensor, as queries, keys and values do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 256), nn.Linear(256, 3)
        self.query, self.key, self.value = (nn.Linear(256, width) for width in (256, 256, 192))
        self.gate = nn.Linear(256, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        scores = self.query(h) @ self.key(input=h).mT
        mixed = (scores.softmax(-1) @ torch.cat([self.value(h), self.value(h.clone())[..., :64]], -1)).tanh()
        return self.last(mixed * self.gate(h)).mean(1)


@pytest.mark.parametrize("positions", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_with_the_same_input_share_its_gram_matrix(
    positions: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Projections().to(dtype)
    x, y = torch.randn(6, positions, 6, dtype=dtype), torch.randint(3, (6,))
    products, columns = [], gram.gram_columns

    def counted(value: Tensor, *where: Any) -> Tensor:
        products.append(value.shape[-1])
        return columns(value, *where)

    monkeypatch.setattr(gram, "gram_columns", counted)
    monkeypatch.setattr(outer, "gram_columns", counted)
    with FisherMonitor(model) as monitor:
        for _ in range(4):  # of which the last is not checked
            products.clear()
            nn.functional.cross_entropy(model(x), y).backward()
    expected = trace(per_sample_squared_norms(model, nn.CrossEntropyLoss(), x, y))
    found = monitor.report()["fisher_trace"]
    for name, value in expected.items():
        assert_equal(found[name], value, total(expected), dtype=dtype)
    if positions == 40:
        # Of inputs two strips for the query and the gate together, two for the key, three for the value's two calls; of
        # gradients two for each of the query, the key and the gate.
        assert products.count(256) == 7 + 6
