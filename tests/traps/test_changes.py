"""Trap 31: what changes inside of the block. The number is right, or the batch is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expectations import expectation
from oracles import assert_equal, per_sample_squared_norms
from torch_secorder import FisherMonitor
from torch_secorder.errors import CoupledSamplesError
from torch_secorder.pruning import Gates


def net() -> tuple[nn.Sequential, Tensor, Tensor]:
    layers = (nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4), nn.Linear(4, 3))
    return nn.Sequential(*layers).double().eval(), torch.randn(6, 4).double(), torch.randint(3, (6,))


def patch_forward(model: nn.Sequential) -> None:
    layer = model[0]
    layer.forward = lambda x: 2 * F.linear(x, layer.weight, layer.bias)  # type: ignore[method-assign,assignment]


def freeze_the_first(model: nn.Sequential) -> None:
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)


def freeze_one(model: nn.Sequential) -> None:
    model[3].weight.requires_grad_(False)


CHANGES: dict[Callable[[nn.Sequential], None], str] = {
    patch_forward: r"Linear '0': its forward was replaced",
    freeze_the_first: r"0.weight, 0.bias, 1.weight, 1.bias: frozen since the monitor was made.*parameters=\"all\"",
    freeze_one: r"3.weight: frozen since the monitor was made",
}


@pytest.mark.parametrize(("change", "refusal"), CHANGES.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_trap_31_what_is_changed_inside_of_the_block_is_refused(
    change: Callable[[nn.Sequential], None], refusal: str
) -> None:
    """The batch before stays as it was counted, and the remedy that is named is exact."""
    model, x, y = net()
    expected = per_sample_squared_norms(model, F.cross_entropy, x, y)
    with FisherMonitor(model) as monitor:
        F.cross_entropy(model(x), y).backward()
        change(model)
        with expectation(refusal):
            F.cross_entropy(model(x), y).backward()
    assert monitor.n_samples == 6
    for name, t in expected.items():
        assert_equal(torch.tensor(monitor.report().loc[name, "fisher_trace"]), t.mean(), monitor.trace)
    expected = per_sample_squared_norms(model, F.cross_entropy, x, y, parameters="all")
    if change is not patch_forward:  # whose copy computes with the weights of the original
        with FisherMonitor(model, parameters="all") as monitor:
            F.cross_entropy(model(x), y).backward()
        for name, t in expected.items():
            assert_equal(torch.tensor(monitor.report().loc[name, "fisher_trace"]), t.mean(), monitor.trace)


def test_trap_31_the_mode_changes_between_forward_and_backward() -> None:
    model, x, y = net()
    expected = per_sample_squared_norms(model, F.cross_entropy, x, y)
    with FisherMonitor(model) as monitor:
        for _ in range(4):
            loss = F.cross_entropy(model.eval()(x), y)
            model.train()
            loss.backward()
        with pytest.raises(CoupledSamplesError, match="BatchNorm1d '1'"):
            model(x)
    for name, t in expected.items():
        assert_equal(torch.tensor(monitor.report().loc[name, "fisher_trace"]), t.mean(), monitor.trace)


@pytest.mark.parametrize("training", [False, True])
def test_trap_31_statistics_are_those_of_the_mode_in_the_forward(training: bool) -> None:
    norm = nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
    model = nn.Sequential(nn.Conv1d(2, 3, 3), norm, nn.Flatten(), nn.Linear(12, 3)).double()
    nn.init.uniform_(norm.running_mean)
    x, y = torch.randn(5, 2, 6).double(), torch.randint(3, (5,))
    expected = per_sample_squared_norms(model.train(training), F.cross_entropy, x, y)
    with FisherMonitor(model) as monitor:
        loss = F.cross_entropy(model(x), y)
        model.train(not training)
        loss.backward()
    for name, t in expected.items():
        assert_equal(torch.tensor(monitor.report().loc[name, "fisher_trace"]), t.mean(), monitor.trace)


def test_trap_31_gates_of_two_batches_in_one_backward_pass() -> None:
    """They are asked about as a monitor's are, and answer as for two passes once it is said what the calls mean."""
    model = nn.Sequential(nn.Linear(4, 3)).double()
    x, y = torch.randn(2, 4, 4).double(), torch.randint(3, (2, 4))
    with Gates(model) as apart:
        for inputs, labels in zip(x, y, strict=True):
            F.cross_entropy(model(inputs), labels).backward()
    with Gates(model) as unsaid, expectation(r"two calls of the model.*repeated_calls=\"same\"|repeated_calls"):
        (F.cross_entropy(model(x[0]), y[0]) + F.cross_entropy(model(x[1]), y[1])).backward()
    assert unsaid.n_samples == 0
    # The sum of two averages of four is twice the average of eight.
    with Gates(model, repeated_calls="new", loss_scale=2.0) as together:
        (F.cross_entropy(model(x[0]), y[0]) + F.cross_entropy(model(x[1]), y[1])).backward()
    assert together.n_samples == apart.n_samples == 8
    torch.testing.assert_close(together.fisher, apart.fisher, rtol=1e-10, atol=0)


def test_trap_31_gates_of_a_model_that_mixes_samples_inside_of_the_block() -> None:
    model, x, _ = net()
    with Gates(model) as gates:
        model.train()
        with pytest.raises(CoupledSamplesError, match="BatchNorm1d '1'"):
            model(x)
    assert gates.n_samples == 0


class Tied(nn.Module):
    """A model that uses a weight outside of its module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(4, 4), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.first(x).tanh() * self.scale, self.first.weight)


CONVERSIONS: dict[str, Callable[[nn.Module], object]] = {
    "to double": lambda model: model.double(),
    "there and back": lambda model: model.double().float(),
    "one layer there and back": lambda model: next(model.children()).double().float(),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_trap_31_a_conversion_inside_of_the_block(conversion: str) -> None:
    """torch gives converted parameters other nodes; passes through these are no passes of somebody else."""
    model, x, y = (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        torch.randn(2, 6, 4),
        torch.randint(3, (2, 6)),
    )
    rows, squares = dict[str, Tensor](), dict[str, Tensor]()
    with FisherMonitor(model) as monitor:
        for batch, labels in zip(x, y, strict=True):
            batch = batch.to(model[0].weight.dtype)
            own = per_sample_squared_norms(model, F.cross_entropy, batch, labels)
            rows = {name: torch.cat([rows.get(name, t[:0]), t]) for name, t in own.items()}
            model.zero_grad()
            F.cross_entropy(model(batch), labels).backward()
            for name, p in model.named_parameters():
                assert p.grad is not None
                squares[name] = squares.get(name, torch.zeros(()).double()) + p.grad.double().square().sum() / 2
            CONVERSIONS[conversion](model)
    assert monitor.n_samples == 12
    for name, t in rows.items():
        found = monitor.report().loc[name]
        assert_equal(torch.tensor(found["fisher_trace"]), t.mean(), monitor.trace, torch.float32)
        assert_equal(torch.tensor(found["grad_sq_norm"]), squares[name], monitor.trace, torch.float32)


def test_trap_31_a_conversion_of_what_is_used_outside_of_its_module() -> None:
    """It is refused, and entering the block again is exact."""
    model, x, y = Tied(), torch.randn(6, 4), torch.randint(4, (6,))
    monitor = FisherMonitor(model)
    with monitor:
        F.cross_entropy(model(x), y).backward()
        model.double()
        with expectation("was moved or converted inside of the block"):
            F.cross_entropy(model(x.double()), y).backward()
    assert monitor.n_samples == 6
    with monitor:
        F.cross_entropy(model(x.double()), y).backward()
    assert monitor.n_samples == 12
    for name, t in per_sample_squared_norms(model, F.cross_entropy, x, y).items():
        assert_equal(torch.tensor(monitor.report().loc[name, "fisher_trace"]), t.mean(), monitor.trace, torch.float32)


def test_trap_31_gradients_of_some_converted_parameters_are_refused() -> None:
    model, x, y = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4), torch.randint(3, (6,))
    with FisherMonitor(model) as monitor:
        F.cross_entropy(model(x), y).backward()
        model.double()
        with expectation("computes no gradient of 0.weight, 0.bias"):
            torch.autograd.grad(F.cross_entropy(model(x.double()), y), list(model[2].parameters()))
    assert monitor.n_samples == 6


def test_trap_31_a_model_all_of_whose_parameters_are_replaced() -> None:
    """No analyzed parameter gets a gradient then, and the pass is one of the samples nevertheless."""
    model, x, y = net()
    with FisherMonitor(model) as monitor:
        F.cross_entropy(model(x), y).backward()
        for module in model:
            for name, p in list(module.named_parameters()):
                setattr(module, name, nn.Parameter(p.detach().clone()))
        with expectation("replaced, removed or added"):
            F.cross_entropy(model(x), y).backward()
    assert monitor.n_samples == 6
