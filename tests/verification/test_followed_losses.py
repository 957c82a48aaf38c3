"""Losses that are proven to keep samples apart, and losses that must not be."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_secorder.batch_axis.samples import BatchSamples
from torch_secorder.batch_axis.told import told
from torch_secorder.errors import VerificationError
from torch_secorder.losses import causal_lm
from torch_secorder.verification import separable_loss
from torch_secorder.verification.followed_loss import keeps_samples_apart
from torch_secorder.verification.separable_loss import require_separable
from verification.test_selections import COUPLING

Loss = Callable[[Any, Any], Tensor]
N, C, T = 6, 4, 5


def classes(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(N, C, *shape, dtype=torch.float64), torch.randint(C, (N, *shape))


def values(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(N, *shape, dtype=torch.float64), torch.rand(N, *shape, dtype=torch.float64)


def tokens() -> tuple[Tensor, Tensor]:
    return torch.randn(N, T, C, dtype=torch.float64), torch.randint(C, (N, T))


def shifted(o: Tensor, y: Tensor) -> Tensor:
    """The loss of language models as scripts write it."""
    return F.cross_entropy(o[..., :-1, :].contiguous().view(-1, o.size(-1)), y[..., 1:].contiguous().view(-1))


def two_losses(o: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    return F.cross_entropy(o[0], y) + 0.5 * F.mse_loss(o[1], o[1].shape[0] * torch.ones(N, 2))


PROVEN: dict[str, tuple[Loss, tuple[Any, Any]]] = {
    "cross-entropy": (nn.CrossEntropyLoss(), classes()),
    "its sum, with weights": (nn.CrossEntropyLoss(torch.rand(C).double(), reduction="sum"), classes()),
    "a partial": (partial(F.cross_entropy, weight=torch.rand(C).double()), classes()),
    "of pixels": (nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=1), classes(3, 2)),
    "of samples, averaged": (lambda o, y: F.cross_entropy(o, y, reduction="none").mean(), classes()),
    "of pixels, averaged": (lambda o, y: F.cross_entropy(o, y, reduction="none").sum((1, 2)).mean(), classes(3, 2)),
    "of flat tokens": (lambda o, y: F.cross_entropy(o.flatten(0, 1), y.flatten()), tokens()),
    "of shifted tokens": (shifted, tokens()),
    "of transposed tokens": (lambda o, y: F.cross_entropy(o.transpose(1, 2), y) / 2, tokens()),
    "log-likelihood": (lambda o, y: F.nll_loss(o.log_softmax(-1), y), classes()),
    "squares": (nn.MSELoss(), values(3)),
    "squares of one number": (lambda o, y: F.mse_loss(o.squeeze(-1), y[:, 0]), values(1)),
    "Huber": (nn.HuberLoss(), values(3)),
    "Bernoulli": (nn.BCEWithLogitsLoss(pos_weight=torch.rand(3).double()), values(3)),
    "Poisson": (nn.PoissonNLLLoss(), values(3)),
    "two outputs": (two_losses, ((classes()[0], values(2)[0]), torch.randint(C, (N,)))),
    "a causal language model": (causal_lm(), tokens()),
}  # fmt: skip


@pytest.mark.parametrize("name", PROVEN)
def test_a_loss_that_is_proven_passes_the_trials(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss_fn, (outputs, targets) = PROVEN[name]
    where = BatchSamples(N, told(nn.Identity(), None, None, None))
    assert keeps_samples_apart(loss_fn, outputs, targets, where)
    monkeypatch.setattr(separable_loss, "keeps_samples_apart", lambda *_: False)
    require_separable(loss_fn, outputs, targets, where)


class Spread(torch.autograd.Function):
    """The samples' losses, with a gradient that mixes samples."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * ctx.saved_tensors[0].sum(0).expand_as(ctx.saved_tensors[0])


def hooked(o: Tensor, y: Tensor) -> Tensor:
    o = o * 1.0
    o.register_hook(lambda g: g - g.mean(0))
    return F.mse_loss(o, y)


def written(o: Tensor, y: Tensor) -> Tensor:
    kept = torch.zeros_like(y)
    kept.copy_(o.detach().mean(0).expand_as(y))
    return F.mse_loss(o, kept)


def in_scripted_code(o: Tensor, y: Tensor) -> Tensor:
    """A scripted function writes over a part of what the loss is computed from."""
    o = o * 1.0
    center(o.detach())
    return F.mse_loss(o, y)


def center_(o: Tensor) -> None:
    o.sub_(o.mean(0))


def mean_(o: Tensor) -> float:
    return float(o.mean())


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Programs that script functions still run.
    center, mean = torch.jit.script(center_), torch.jit.script(mean_)


WORKER = ThreadPoolExecutor(1)


def in_a_thread(function: Callable[[], Any]) -> Any:
    """What a function returns in a thread of its own."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(function).result()


def elsewhere(function: Callable[[], Any]) -> Any:
    """What a function returns in a thread that waits for work all the time."""
    return WORKER.submit(function).result()


NOT_PROVEN: dict[str, Loss] = {
    **COUPLING,
    "contrastive": lambda o, y: F.cross_entropy(o @ o.T, torch.arange(len(o))),
    "centered": lambda o, y: F.mse_loss(o - o.mean(0), y),
    "along the samples": lambda o, y: F.mse_loss(o.softmax(0), y),
    "along the samples, transposed": lambda o, y: F.mse_loss(o.transpose(0, 1).softmax(1), y.T),
    "classes that are samples": lambda o, y: F.cross_entropy(o.T, torch.arange(o.shape[1])),
    "every output with every target": lambda o, y: F.mse_loss(o[:, :1], y[:, 0]),
    "rows across samples": lambda o, y: F.mse_loss(o.reshape(2, -1).softmax(1), y.reshape(2, -1)),
    "one row for all": lambda o, y: F.mse_loss(o.flatten().softmax(0), y.flatten()),
    "a root": lambda o, y: F.mse_loss(o, y).sqrt(),
    "a product of losses": lambda o, y: F.mse_loss(o, y) * F.l1_loss(o, y),
    "weights of the losses": lambda o, y: (each_of(o, y) * each_of(o, y).detach().softmax(0)).sum(),
    "weights by numpy": lambda o, y: (each_of(o, y) * torch.from_numpy(np.asarray(o.detach()).sum(1))).mean(),
    "weights by a number": lambda o, y: F.mse_loss(o, y) * float(o.detach().mean()),
    "a choice by a number": lambda o, y: F.mse_loss(o, y) if o.detach().sum() > 0 else F.l1_loss(o, y),
    "targets of the outputs": lambda o, y: F.mse_loss(o, o.detach().mean(0).expand_as(o)),
    "targets that are written": written,
    "a gradient of its own": lambda o, y: Spread.apply(o) / len(o),
    "a hook": hooked,
    "what scripted code has written": in_scripted_code,
    "a number of scripted code": lambda o, y: F.mse_loss(o, y) * mean(o),
    "a number of a new thread": lambda o, y: F.mse_loss(o, y) * in_a_thread(lambda: float(o.detach().mean())),
    "a number of a thread that was there": lambda o, y: F.mse_loss(o, y) * elsewhere(lambda: o.detach().mean().item()),
    "a number of what is computed": lambda o, y: (z := o * 2).sum() * elsewhere(lambda: z.detach().sum().item()),
    "an array of a thread": lambda o, y: F.mse_loss(o, y) * float(elsewhere(lambda: o.detach().numpy()).mean()),
    "a list of a thread": lambda o, y: F.mse_loss(o, y) * elsewhere(lambda: o.detach().tolist())[0][0],
}  # fmt: skip


def each_of(o: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(o, y, reduction="none").sum(1)


@pytest.mark.parametrize("name", NOT_PROVEN)
def test_a_loss_that_couples_samples_is_not_proven(name: str) -> None:
    assert not keeps_samples_apart(NOT_PROVEN[name], *values(3), BatchSamples(N))


def test_samples_on_another_axis_than_the_first() -> None:
    where = BatchSamples(N, told(nn.Identity(), {"outputs": 1}, None, None))
    outputs, targets = torch.randn(3, N, C), torch.randint(C, (3, N))
    assert keeps_samples_apart(lambda o, y: F.mse_loss(o, torch.zeros(3, N, C)), outputs, targets, where)
    for loss in (lambda o, y: F.cross_entropy(o.transpose(1, 2), y), lambda o, y: F.cross_entropy(o, y[:, :C])):
        assert not keeps_samples_apart(loss, outputs, targets, where)


@pytest.mark.parametrize("pair", [(0, 1), (4, 2), (6, 5)])
def test_the_trials_see_a_single_pair_of_samples(pair: tuple[int, int]) -> None:
    """Whichever of its two samples sees the other."""
    one, other = pair

    def loss(o: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(o, y) + (o[one].detach() * o[other]).sum() / len(o)

    with pytest.raises(VerificationError, match="compares samples"):
        require_separable(loss, torch.randn(7, 3).double(), torch.randn(7, 3).double(), BatchSamples(7))
