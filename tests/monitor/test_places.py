"""Which passes share a schedule of checks: those of blocks that the program comes to in the same way, and of one kind of loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expectations import expectation
from monitor.classifier import assert_report, batch, classifier, norms
from torch_secorder import FisherMonitor, register_rule
from torch_secorder.errors import CoverageError
from torch_secorder.rules import registry

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def measured(model: nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """What a program writes once and calls from many places."""
    with FisherMonitor(model) as monitor:
        loss(model(x)).backward()
    return float(monitor.trace)


def test_a_function_that_is_called_with_another_loss_elsewhere_is_checked_there() -> None:
    model, x, y = nn.Linear(4, 3), torch.randn(5, 4), torch.randint(3, (5,))
    for _ in range(6):
        measured(model, lambda outputs: F.cross_entropy(outputs, y), x)
    with pytest.raises(CoverageError, match="a weight penalty"):
        measured(model, lambda outputs: F.cross_entropy(outputs, y) + model.weight.square().sum(), x)


def test_a_pass_of_some_parameters_is_refused_each_time() -> None:
    """A refused pass is none of those after which a kind of graph is looked at less often."""
    model, x, y = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4), torch.randint(3, (6,))
    with FisherMonitor(model) as monitor:
        for _ in range(8):
            with pytest.raises(CoverageError, match=r"no gradient of 0\.weight"):
                F.cross_entropy(model(x), y).backward(inputs=[model[2].weight])
        F.cross_entropy(model(x), y).backward()
    assert monitor.n_samples == len(x)


def data(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def used_by_the_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The last layer is used a second time, for other samples and outside of the model: its trace would lack them."""
    return data(model, x, y) + F.cross_entropy(F.linear(x.flip(0).tanh(), model[0].weight)[:, :3], y)


def penalized(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return data(model, x, y) + model[0].weight.square().sum()


@pytest.mark.parametrize("other", [used_by_the_loss, penalized])
def test_a_line_that_differentiates_another_loss_has_it_checked(other: Loss) -> None:
    """The fourth pass of one kind is not checked."""
    model, batches = classifier(), [batch() for _ in range(6)]
    with FisherMonitor(model) as monitor:
        for loss, one in zip([data, data, data, other, data], batches, strict=False):
            with expectation("by another way than through the model" if loss is other else ""):
                loss(model, *one).backward()
    assert_report(monitor, norms(model, *batches[:3], batches[4]))


class Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


@pytest.mark.parametrize("passes_before", [0, 3])
@pytest.mark.parametrize("way", ["sum", "both", "grad"])
def test_a_pass_that_leaves_out_a_part_that_its_loss_depends_on_is_refused(way: str, passes_before: int) -> None:
    """Engines skip what is not asked for, here the whole of b with its output; a loss of a's output alone is a whole pass."""
    model, (x, y) = Twins(), batch()
    with FisherMonitor(model) as monitor:
        for _ in range(passes_before):
            F.cross_entropy(model(x)[0], y).backward()
        losses, wanted = [F.cross_entropy(outputs, y) for outputs in model(x)], list(model.a.parameters())
        with expectation(r"no gradient of b\.weight, b\.bias, on which the loss depends"):
            if way == "sum":
                sum(losses).backward(inputs=wanted)
            elif way == "both":
                torch.autograd.backward(losses, inputs=wanted)
            else:
                torch.autograd.grad(sum(losses), wanted)
        F.cross_entropy(model(x)[0], y).backward()
    assert monitor.n_samples == (passes_before + 1) * len(x)
    expected = norms(model.a, (x, y))
    for name, value in expected.items():
        assert float(monitor.report().fisher_trace[f"a.{name}"]) == pytest.approx(float(value.mean()), rel=1e-8)
    assert not monitor.report().fisher_trace[["b.weight", "b.bias"]].any()


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_another_output_is_another_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong rule of the user's is found where its layer is first reached, be it by the same function of another output."""
    monkeypatch.setattr(registry, "_rules", dict(registry._rules))
    register_rule(Scale)(lambda module, call: {"weight": 2 * call.inputs[0] * call.grad_output})
    model, (x, y) = Twins(), batch()
    model.b = Scale()
    with FisherMonitor(model) as monitor:
        for _ in range(3):
            F.cross_entropy(model(x)[0], y).backward()
        with pytest.raises(
            CoverageError, match=r"the gradient of parameter b\.weight is not the sum .* a rule is wrong"
        ):
            F.cross_entropy(model(x)[1], y).backward()
    assert monitor.n_samples == 3 * len(x)
