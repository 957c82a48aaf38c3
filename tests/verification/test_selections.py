"""Losses that select among samples: refused, though their derivatives are constant between two changes of the order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from problems._base import randomized
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report
from torch_secorder.errors import CurvatureError, VerificationError
from traps.exactness import assert_exact

Loss = Callable[[Tensor, Tensor], Tensor]


def each(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(1)


def differences(outputs: Tensor, targets: Tensor) -> Tensor:
    """Of the first outputs of each two samples that are in order."""
    scores = outputs[:, 0]
    return (scores[:, None] - scores) * (targets[:, None, 0] > targets[:, 0])


COUPLING: dict[str, Loss] = {
    "hard examples": lambda o, y: each(o, y).topk(-(-len(o) // 2))[0].mean(),
    "trimmed": lambda o, y: each(o, y).sort()[0][: -(-len(o) // 2)].mean(),
    "the median": lambda o, y: each(o, y).median() + each(o, y).mean(),
    "a quantile": lambda o, y: each(o, y).kthvalue(1)[0] + each(o, y).mean(),
    "the largest": lambda o, y: each(o, y).max(),
    "the largest along an axis": lambda o, y: each(o, y).max(0)[0],
    "the smallest of some": lambda o, y: each(o, y).amin((0,)),
    "the largest in other axes": lambda o, y: each(o, y)[None, :, None].amax((-2, 0)).mean(),
    "the larger of two": lambda o, y: torch.maximum(each(o, y), each(o, y).roll(1)).mean(),
    "pairwise hinges that are all active": lambda o, y: F.relu(100 - differences(o, y)).mean(0).mean() * 2,
    "pairwise hinges": lambda o, y: F.relu(0.1 - differences(o, y)).mean() + each(o, y).mean(),
    "distances": lambda o, y: (o[:, None] - o).abs().mean() + each(o, y).mean(),
    "a batch that is flooded": lambda o, y: (each(o, y).mean() - 0.1).abs() + 0.1,
}
SEPARABLE: dict[str, Loss] = {
    "hinges": lambda o, y: F.relu(1 - o * y.sign()).sum(1).mean(),
    "the largest output": lambda o, y: o.max(1)[0].mean() + each(o, y).mean(),
    "the largest two": lambda o, y: o.topk(2, 1)[0].sum(1).mean(),
    "the largest of all axes but one": lambda o, y: o[..., None].amax((1, 2)).mean() + each(o, y).mean(),
    "the larger of one sample's": lambda o, y: torch.maximum(o[:, 0], o[:, 1]).mean() + each(o, y).mean(),
    "absolute errors": lambda o, y: F.l1_loss(o, y, reduction="none").sum(1).mean(),
    "samples sorted beside": lambda o, y: (each(o, y)[y[:, 0].argsort()] * (1 + y[:, 1].sort()[0] * 0)).mean(),
    "a sum that is clamped": lambda o, y: each(o, y).clamp(0.01, 1e3).mean(),
}


def problem(n: int) -> tuple[nn.Module, Tensor, Tensor]:
    model = randomized(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).double()
    return model, torch.randn(n, 4).double(), torch.randn(n, 3).double()


@pytest.mark.parametrize("n", [3, 8])
@pytest.mark.parametrize("name", COUPLING)
def test_trap_23_a_loss_that_selects_among_samples_is_refused(name: str, n: int) -> None:
    model, x, y = problem(n)
    # Of samples given twice, these two select another share of three than of six.
    by_count = n == 3 and name in ("hard examples", "trimmed")
    for ask in (
        lambda: empirical_fisher_trace(model, COUPLING[name], x, y),
        lambda: fisher_report(model, COUPLING[name], (x, y), progress=False),
    ):
        with pytest.raises(CurvatureError, match="neither averages nor sums" if by_count else "selects among them"):
            ask()
    with pytest.raises(VerificationError, match="selects among them"):
        verified(model, COUPLING[name], x, y)


def verified(model: nn.Module, loss_fn: Loss, x: Tensor, y: Tensor) -> None:
    with FisherMonitor(model) as monitor:
        outputs = model(x)
        loss = loss_fn(outputs, y)
        monitor.verify(loss)
        loss.backward()


@pytest.mark.parametrize("n", [3, 8])
@pytest.mark.parametrize("name", SEPARABLE)
def test_trap_23_a_loss_that_selects_within_samples_is_exact(name: str, n: int) -> None:
    """With n = 3 the samples are as many as the outputs, so that no size tells one axis from the other."""
    model, x, y = problem(n)
    verified(model, SEPARABLE[name], x, y)
    assert_exact(model, x, y, SEPARABLE[name])


def chosen(of: Callable[[Tensor], Tensor]) -> Loss:
    """The mean over all samples of the losses, with weights that are computed from all losses and leave the graph."""

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        losses = each(outputs, targets)
        return (losses * of(losses.detach())).mean()

    return loss_fn


CONSTANTS: dict[str, Loss] = {
    "from the median up": chosen(lambda losses: losses >= losses.median()),
    "above the mean": chosen(lambda losses: losses > losses.mean()),
    "above the mean, and their number": lambda o, y: each(o, y)[each(o, y) > each(o, y).mean()].mean(),
    "above a threshold, and their number": lambda o, y: each(o, y)[each(o, y) > 3].mean(),
    "by rank": chosen(lambda losses: losses.argsort().argsort() / len(losses)),
    "in proportion to the losses": chosen(lambda losses: losses / losses.mean()),
    "over the largest": chosen(lambda losses: 1 / losses.max()),
}


@pytest.mark.parametrize("outlier", [0.0, 30.0], ids=["", "an outlier"])
@pytest.mark.parametrize("name", CONSTANTS)
def test_trap_23_what_leaves_the_graph_is_seen_where_the_loss_is_called(name: str, outlier: float) -> None:
    """A mask of constants shows nothing in a graph; other outputs make another mask, unless one sample is far above all."""
    model, x, y = problem(8)
    y[3] += outlier
    for ask in (
        lambda: empirical_fisher_trace(model, CONSTANTS[name], x, y),
        lambda: fisher_report(model, CONSTANTS[name], (x, y), progress=False),
    ):
        by_count = name == "by rank"  # of samples given twice, the ranks are others
        with pytest.raises(CurvatureError, match="neither averages nor sums" if by_count else "selects among them"):
            ask()


@pytest.mark.parametrize("name", CONSTANTS)
def test_trap_23_what_leaves_the_graph_is_constant_in_a_monitor(name: str) -> None:
    """A sample's share of the loss that a monitor sees has constant weights: its gradient is what the sample adds to .grad."""
    model, x, y = problem(8)
    monitored = FisherMonitor(model, per_sample=True)
    with monitored:
        outputs = model(x)
        loss = CONSTANTS[name](outputs, y)
        monitored.verify(loss)
        loss.backward()
    outputs = model(x)
    (seed,) = torch.autograd.grad(CONSTANTS[name](outputs, y), outputs, retain_graph=True)
    for row, p in model.named_parameters():
        of_sample = [torch.autograd.grad(outputs[n], p, 8 * seed[n], retain_graph=True)[0] for n in range(8)]
        expected = torch.stack([g.square().sum() for g in of_sample])
        torch.testing.assert_close(torch.tensor(monitored.per_sample[row].to_numpy()), expected, rtol=1e-10, atol=1e-20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trap_23_rounding_is_no_selection(dtype: torch.dtype) -> None:
    model, x, y = problem(40)
    model, x, y = model.to(dtype), x.to(dtype), y.to(dtype)
    verified(model, SEPARABLE["hinges"], x, y)
    with pytest.raises(VerificationError, match="selects among them"):
        verified(model, COUPLING["pairwise hinges"], x, y)


@pytest.mark.parametrize("pair", [(0, 2), (1, 3), (0, 4), (3, 4)], ids=str)
def test_trap_07_one_pair_of_samples_that_compare_is_seen(pair: tuple[int, int]) -> None:
    """Also where one half of the samples has both of them."""
    model, x, y = problem(5)
    i, j = pair

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        shares = (outputs - targets).square().sum(1)
        return shares.mean() + (outputs[i] - outputs[j]).square().sum() / 5

    with pytest.raises(VerificationError, match="compares samples"):
        verified(model, loss_fn, x, y)
