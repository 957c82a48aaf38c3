"""A function of the user's that sees every module's output and gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from oracles import activation_squared_norms, double_copy
from torch_secorder import FisherMonitor
from torch_secorder.errors import ArgumentError, CoverageError, ShapeError


def network(inplace: bool = False) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(inplace), nn.Flatten(), nn.Linear(64, 3)).double()


def data(n: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 2, 6, 6, dtype=torch.float64), torch.randint(3, (n,))


def test_traces_per_channel_and_per_sample() -> None:
    model, (x, y) = network(), data()
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    names = {module: name for name, module in model.named_modules()}

    def note(module: nn.Module, output: Tensor, grad: Tensor) -> None:
        assert not output.requires_grad
        seen.setdefault(names[module], []).append((output, grad))

    with FisherMonitor(model, on_output=note, activations=True) as monitor:
        cross_entropy(model(x), y).backward()
    assert set(seen) == {"", "0", "1", "2", "3"}
    assert all(len(calls) == 1 for calls in seen.values())
    for name, ((output, grad),) in seen.items():
        own = (5 * grad).square().flatten(1).sum(1)
        if name:
            torch.testing.assert_close(
                own, activation_squared_norms(model, name, cross_entropy, x, y), rtol=1e-10, atol=0
            )
            torch.testing.assert_close(output, model[: int(name) + 1](x).detach(), rtol=0, atol=0)
        assert float(own.mean()) == pytest.approx(monitor.activations.loc[name, "activation_trace"], rel=1e-10)
    # By channels, against a loop over samples.
    twin, _ = double_copy(model)
    expected = torch.zeros(4, dtype=torch.float64)
    for n in range(5):
        hidden = twin[0](x[n : n + 1]).detach().requires_grad_()
        cross_entropy(twin[1:](hidden), y[n : n + 1]).backward()
        assert hidden.grad is not None
        expected += hidden.grad.square().sum((0, 2, 3)) / 5
    ((_, grad),) = seen["0"]
    torch.testing.assert_close((5 * grad).square().sum((0, 2, 3)) / 5, expected, rtol=1e-10, atol=0)


def test_every_pass_calls_it_and_results_keep_nothing_of_it() -> None:
    model, (x, y) = network(), data()
    called: list[nn.Module] = []
    with (
        FisherMonitor(model, on_output=lambda module, *_: called.append(module)) as monitor,
        FisherMonitor(model) as alone,
    ):
        for _ in range(2):
            cross_entropy(model(x), y).backward()
    assert sorted(map(id, called)) == sorted(map(id, [model, *model] * 2))
    assert "on_output" not in monitor.state_dict()["keeps"]
    torch.testing.assert_close(monitor.trace, alone.trace)


def test_samples_come_first() -> None:
    shapes = []
    model, x, y = nn.Linear(4, 3), torch.randn(7, 5, 4), torch.randint(3, (5,))
    with FisherMonitor(model, batch_axis=1, on_output=lambda module, f, g: shapes.append((f.shape, g.shape))):
        cross_entropy(model(x).mean(0), y).backward()
    assert shapes == [((5, 7, 3), (5, 7, 3))]


def test_an_output_that_all_samples_share_is_expanded_to_them() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places, self.head = nn.Linear(2, 4), nn.Linear(4, 3)
            self.register_buffer("grid", torch.randn(6, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x + self.places(self.grid)).tanh()).mean(1)

    model, x, y = Positions(), torch.randn(5, 6, 4), torch.randint(3, (5,))
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    with FisherMonitor(model, on_output=lambda module, output, grad: seen.update({module: (output, grad)})):
        cross_entropy(model(x), y).backward()
    output, grad = seen[model.places]
    torch.testing.assert_close(output, model.places(model.grid).detach().expand(5, 6, 4), rtol=0, atol=0)
    for n in range(5):
        shared = model.places(model.grid).detach().requires_grad_()
        cross_entropy(model.head((x[n : n + 1] + shared).tanh()).mean(1), y[n : n + 1]).backward()
        assert shared.grad is not None
        torch.testing.assert_close(5 * grad[n], shared.grad, rtol=1e-4, atol=1e-7)


def test_outputs_that_are_changed_in_place_are_refused() -> None:
    model, (x, y) = network(inplace=True), data()
    words = "Conv2d '0': its output was changed in place"
    with pytest.raises(CoverageError, match=words), FisherMonitor(model, on_output=lambda *_: None):
        cross_entropy(model(x), y).backward()
    assert all(p.grad is not None for p in model.parameters()), "gradients are complete"


def test_its_own_error_comes_after_the_pass() -> None:
    def fails(*_: Any) -> None:
        raise KeyError("mine")

    model, (x, y) = network(), data()
    with pytest.raises(KeyError, match="mine"), FisherMonitor(model, on_output=fails):
        cross_entropy(model(x), y).backward()
    assert all(p.grad is not None for p in model.parameters()), "gradients are complete"


def test_it_must_be_a_function() -> None:
    with pytest.raises(ArgumentError, match="on_output must be a function"):
        FisherMonitor(network(), on_output="print")  # type: ignore[arg-type]


def test_as_many_positions_as_samples_have_to_be_told_apart() -> None:
    """Steps in front, and as many of them as samples: no size says which axis the function gets first."""

    class StepsFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.transpose(0, 1)).tanh().transpose(0, 1).mean(1)

    model, x, y = StepsFirst().double(), torch.randn(5, 5, 4, dtype=torch.float64), torch.randint(3, (5,))
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def note(module: nn.Module, output: Tensor, grad: Tensor) -> None:
        seen[module] = (output, grad)

    message = r"axis 0 or 1.*batch_axis=\{'modules': \{'layer': axis\}\}"
    with pytest.raises(ShapeError, match=message), FisherMonitor(model, on_output=note):
        cross_entropy(model(x), y).backward()
    with FisherMonitor(model, on_output=note, batch_axis={"modules": {"layer": 1}}):
        cross_entropy(model(x), y).backward()
    output, grad = seen[model.layer]
    torch.testing.assert_close(output, model.layer(x).detach(), rtol=0, atol=0)
    for n in range(5):
        hidden = model.layer(x[n : n + 1]).detach().requires_grad_()
        cross_entropy(hidden.tanh().mean(1), y[n : n + 1]).backward()
        torch.testing.assert_close(5 * grad[n], hidden.grad[0], rtol=1e-10, atol=0)


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # of the compiler's own, when it is imported
def test_a_compiled_model_shows_the_modules_that_it_was_made_of() -> None:
    model, (x, y) = network(), data()
    called: list[nn.Module] = []
    compiled = torch.compile(model, backend="eager")
    with FisherMonitor(compiled, on_output=lambda module, *_: called.append(module)):
        cross_entropy(compiled(x), y).backward()
    assert set(map(id, called)) == set(map(id, [model, *model]))
