"""Many passes that share one pass of the engine: only the sizes of gradients are added up, where that is all that counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from oracles import assert_equal, exact_fisher, total, trace
from torch_secorder import generalized_fisher_trace
from torch_secorder.autograd.graph_pass import GraphPass
from torch_secorder.autograd.self_test import hooks_are_seen
from torch_secorder.errors import NonFiniteError
from torch_secorder.running import outputs_backward

pytestmark = pytest.mark.skipif(not hooks_are_seen(), reason="this torch does not show what holds for all passes")


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many passes shared one of the engine's, each time."""
    found: list[int] = []
    run_each = GraphPass.run_each

    def noted(self: GraphPass, gradients: list[Tensor], arrive: Callable[..., None]) -> None:
        found.append(len(gradients))
        run_each(self, gradients, arrive)

    monkeypatch.setattr(GraphPass, "run_each", noted)
    return found


class Model(nn.Module):
    """Two hidden layers and a last one, of which a subclass changes the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 4)

    def between(self, x: Tensor) -> Tensor:
        return self.middle(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x).relu()).tanh())


class WithoutBias(Model):
    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(5, 5, bias=False)


class Scaled(Model):
    def between(self, x: Tensor) -> Tensor:
        return torch.addmm(self.middle.bias, x, self.middle.weight.T, alpha=2.0, beta=3.0)


class Residual(Model):
    def between(self, x: Tensor) -> Tensor:
        return x + self.middle(x)


class Branches(Model):
    """Another layer beside the one in the middle, whose gradients arrive from two sides."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(5, 5)

    def between(self, x: Tensor) -> Tensor:
        return self.middle(x) * self.other(x)


class Frozen(Model):
    def __init__(self) -> None:
        super().__init__()
        self.middle.weight.requires_grad_(False)
        self.first.bias.requires_grad_(False)


TOGETHER = [Model, WithoutBias, Scaled, Residual, Branches, Frozen]


class Twice(Model):
    """Cross terms between both uses count."""

    def between(self, x: Tensor) -> Tensor:
        return self.middle(self.middle(x).tanh())


class Tied(Model):
    def between(self, x: Tensor) -> Tensor:
        return F.linear(self.middle(x).tanh(), self.middle.weight)


class OneBias(Model):
    """All features share a bias, whose gradient is the sum of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1))

    def between(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.middle.weight.T)


class Normalized(Model):
    def between(self, x: Tensor) -> Tensor:
        return F.linear(x, self.middle.weight / self.middle.weight.norm(dim=0))


class Masked(Model):
    def between(self, x: Tensor) -> Tensor:
        return F.linear(x, self.middle.weight * (torch.arange(5) % 2))


class OfData(Model):
    """The matrix depends on the data."""

    def between(self, x: Tensor) -> Tensor:
        return x @ (self.middle.weight * self.first(torch.ones_like(x[:1, :4])).T)


class Shared(Model):
    """Each sample has two rows, whose cross terms count."""

    def between(self, x: Tensor) -> Tensor:
        rows = torch.stack([x, x.flip(1)], 1).flatten(0, 1)
        return self.middle(rows).unflatten(0, (-1, 2)).sum(1)


class Columns(Model):
    """Samples are in the columns of the product."""

    def between(self, x: Tensor) -> Tensor:
        return (self.middle.weight @ x.T).T


class Scale(Model):
    """A parameter of another kind lies on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(5))

    def between(self, x: Tensor) -> Tensor:
        return self.middle(x) * self.scale


class Checkpointed(Model):
    def between(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(torch.tanh, self.middle(x), use_reentrant=False)
        return found


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]  # torch does not type its arguments.
        return 2 * grad


class Function(Model):
    def between(self, x: Tensor) -> Tensor:
        found: Tensor = Doubled.apply(self.middle(x))  # type: ignore[no-untyped-call]  # torch does not type it.
        return found


APART = [Twice, Tied, OneBias, Normalized, Masked, OfData, Shared, Columns, Scale, Checkpointed, Function]


@pytest.mark.parametrize("loss_type", ["nll", "mse"])
@pytest.mark.parametrize("kind", [*TOGETHER, *APART])
def test_the_sum_is_exact(kind: type[Model], loss_type: str, together: list[int]) -> None:
    model, x = kind().double(), torch.randn(6, 4, dtype=torch.float64)
    expected = total(trace(exact_fisher(model, x, None, loss_type)))
    for _ in range(4):  # The fourth call is not verified.
        assert_equal(generalized_fisher_trace(model, model(x), None, loss_type), expected, expected)  # type: ignore[arg-type]  # A name of the table.
    assert bool(together) == (kind in TOGETHER)


@pytest.mark.parametrize("most", [1, 3])
def test_few_at_a_time(most: int, together: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Model().double(), torch.randn(6, 4, dtype=torch.float64)
    expected = total(trace(exact_fisher(model, x, None, "mse")))
    monkeypatch.setattr(outputs_backward, "MOST_BYTES", most * 6 * 5 * 8)
    assert_equal(generalized_fisher_trace(model, model(x), None, "mse"), expected, expected)
    assert together == [1, *([1] * 4 if most == 1 else [3, 1])]  # one for the check


def test_single_precision(together: list[int]) -> None:
    model, x = Branches(), torch.randn(6, 4)
    expected = total(trace(exact_fisher(model, x)))
    assert_equal(generalized_fisher_trace(model, model(x), None), expected, expected, torch.float32)
    assert together


def test_half_precision_takes_passes_of_its_own(together: list[int]) -> None:
    model, x = Model().bfloat16(), torch.randn(6, 4).bfloat16()
    value = generalized_fisher_trace(model, model(x), None)
    expected = total(trace(exact_fisher(model, x)))
    assert value.item() == pytest.approx(expected.item(), rel=0.05)  # bfloat16 has eight bits
    assert not together


def test_hooks_of_the_users_do_not_run(together: list[int]) -> None:
    model, x = Model().double(), torch.randn(6, 4, dtype=torch.float64)
    outputs, seen = model(x), []
    node = outputs.grad_fn
    while node is not None:
        node.register_prehook(seen.append)
        node = next((child for child, _ in node.next_functions if child is not None and child.next_functions), None)
    expected = total(trace(exact_fisher(model, x)))
    assert_equal(generalized_fisher_trace(model, outputs, None), expected, expected)
    assert together
    assert not seen


def test_a_size_that_is_not_finite_is_refused(together: list[int]) -> None:
    model, x = Model().double(), torch.randn(6, 4, dtype=torch.float64)
    with torch.no_grad():
        model.last.weight.mul_(1e200)  # Squared it is infinite.
    with pytest.raises(NonFiniteError, match=r"first\.weight"):
        generalized_fisher_trace(model, model(x), None, "mse")
    assert together
