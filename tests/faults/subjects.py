"""What the faults happen to: a model with everything that is attached or changed for a while, and the ways to analyze it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from oracles import assert_equal, per_sample_squared_norms
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report, generalized_fisher_trace, hessian_trace

Batch = tuple[Tensor, Tensor]
loss_fn = nn.CrossEntropyLoss()


class Model(nn.Module):
    """A table that its forward rewrites, tied weights, a raw parameter, a frozen layer, buffers, and dropout that is off."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4, max_norm=1.0)
        self.position = nn.Parameter(torch.randn(1, 3, 4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.frozen(self.table(ids) + self.position).tanh()
        return self.head(self.norm(h.mT).mT).mean(1)


def model() -> nn.Module:
    torch.manual_seed(0)
    subject = Model().double().eval()
    subject.table(torch.arange(7))  # from now on no forward changes it
    return subject


def batch(n: int = 4, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(7, (n, 3), generator=generator), torch.randint(7, (n,), generator=generator)


def monitored(subject: nn.Module, data: Batch | None = None) -> Tensor:
    x, y = data or batch()
    with FisherMonitor(subject, diagonal=True) as monitor:
        loss_fn(subject(x), y).backward()
    return monitor.trace


def reported(subject: nn.Module, data: Batch | None = None) -> Tensor:
    table = fisher_report(subject, loss_fn, [data or batch()], parameters="all", progress=False)
    return torch.tensor(table.fisher_trace[[name for name in table.index if "frozen" not in name]].sum())


def hessian(subject: nn.Module) -> Tensor:
    table = hessian_trace(subject, loss_fn, *batch(), num_samples=2, generator=torch.Generator().manual_seed(0))
    return torch.tensor(table.hessian_trace.sum())


EMPIRICAL: dict[str, Callable[..., Tensor]] = {
    "monitor": monitored,
    "empirical_fisher_trace": lambda subject, data=None: empirical_fisher_trace(subject, loss_fn, *(data or batch())),
    "fisher_report": reported,
}
WAYS: dict[str, Callable[[nn.Module], Tensor]] = {
    **EMPIRICAL,
    "generalized_fisher_trace": lambda subject: generalized_fisher_trace(subject, subject(batch()[0]), None),
    "hessian_trace": hessian,
}


def expected(subject: nn.Module, data: Batch | None = None) -> Tensor:
    """The trace by a loop over samples."""
    norms = per_sample_squared_norms(subject, loss_fn, *(data or batch()))
    return torch.stack([t.mean() for t in norms.values()]).sum()


def assert_exact(way: str, subject: nn.Module, data: Batch | None = None) -> None:
    """One of the EMPIRICAL ways gives the right number."""
    right = expected(subject, data)
    assert_equal(EMPIRICAL[way](subject, data).double(), right, right, torch.float64)
    subject.zero_grad()
