"""Trap 6: models and losses that change what they are given in place. The library has each call meet what the first one met."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracles import assert_equal, per_sample_squared_norms
from problems._base import Forward, randomized
from torch_secorder import empirical_fisher_trace, fisher_report, hessian_trace
from torch_secorder.testing import check

Loss = Callable[[Tensor, Tensor], Tensor]


def cooled(outputs: Tensor, targets: Tensor) -> Tensor:
    outputs /= 2
    return F.cross_entropy(outputs, targets)


def clipped(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.clamp_(-0.2, 0.2), targets)


def without_first(outputs: Tensor, targets: Tensor) -> Tensor:
    outputs[:, 0] = -1e3
    return F.cross_entropy(outputs, targets.clamp(min=1))


def from_one(outputs: Tensor, targets: Tensor) -> Tensor:
    targets -= 1
    return F.cross_entropy(outputs, targets)


def scaled_targets(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets.mul_(2))


def of_copies(loss: Loss) -> Loss:
    return lambda outputs, targets: loss(outputs.clone(), targets.clone())


def classes() -> Tensor:
    return torch.tensor([0, 3, 1, 2, 3])


LOSSES: dict[Loss, Callable[[], Tensor]] = {
    cooled: classes,
    clipped: classes,
    without_first: classes,
    from_one: lambda: classes() + 1,
    scaled_targets: lambda: torch.randn(5, 4).double(),
}


def normalized(m: Any, x: Tensor) -> Tensor:
    return m.l(x.div_(3).sub_(0.5))


def rectified(m: Any, x: Tensor) -> Tensor:
    return m.l(F.relu_(x))


def shifted(m: Any, ids: Tensor) -> Tensor:
    ids += 1
    return m.l(m.e(ids).mean(1))


def padded(m: Any, ids: Tensor) -> Tensor:
    ids[ids > 3] = 0
    return m.l(m.e(ids).mean(1))


def net() -> nn.Module:
    return randomized(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))).double()


def assert_right(model: nn.Module, plain: nn.Module, loss: Loss, x: Tensor, y: Tensor, loss_of_copies: Loss) -> None:
    """The library's numbers are those of a loop in which nothing is changed, and its arguments are as they were."""
    inputs, targets = x.clone(), y.clone()
    expected = per_sample_squared_norms(plain, loss_of_copies, inputs, targets)
    everything = sum(t.mean() for t in expected.values())
    for verify in (True, False):
        table = fisher_report(model, loss, [(x, y), (x, y)], verify=verify, progress=False)
        for name, t in expected.items():
            assert_equal(torch.tensor(table.loc[name, "fisher_trace"]), t.mean(), everything)
    assert_equal(empirical_fisher_trace(model, loss, x, y), everything, everything)
    assert check(model, loss, (x, y)).attrs["equal"]
    hessian_trace(model, loss, x, y, 1)
    assert torch.equal(x, inputs)
    assert torch.equal(y, targets)


@pytest.mark.parametrize("loss", LOSSES)
def test_trap_06_a_loss_that_changes_outputs_or_targets_in_place(loss: Loss) -> None:
    model = net()
    assert_right(model, model, loss, torch.randn(5, 4).double(), LOSSES[loss](), of_copies(loss))


@pytest.mark.parametrize("forward", [normalized, rectified, shifted, padded])
def test_trap_06_a_model_that_changes_its_inputs_in_place(forward: Callable[[Any, Tensor], Tensor]) -> None:
    layers = {"l": nn.Linear(4, 4), "e": nn.Embedding(7, 4)} if forward in (shifted, padded) else {"l": net()}
    model = randomized(Forward(forward, **layers)).double()
    plain = Forward(lambda m, x: forward(m, x.clone()), **layers)
    x = torch.randint(6, (5, 3)) if "e" in layers else torch.randn(5, 4).double()
    assert_right(model, plain, F.cross_entropy, x, classes(), F.cross_entropy)


def test_trap_06_a_loss_that_changes_outputs_leaves_random_numbers_as_one_forward_does() -> None:
    model, x = nn.Sequential(net(), nn.Dropout(0.5)), torch.randn(5, 4).double()
    torch.manual_seed(3)
    model(x)
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    fisher_report(model, cooled, (x, classes()), progress=False)
    assert torch.equal(torch.get_rng_state(), expected)
