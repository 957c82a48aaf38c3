"""Small calls of one kind are computed together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from oracles import assert_equal
from torch_secorder import FisherMonitor
from torch_secorder.recording.small_calls import SmallCallBatch


class Block(nn.Module):
    """Layers over positions, with biases and without; of the former torch's graph has the rows of all positions in one axis."""

    def __init__(self, *, bias: bool):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4, bias=bias) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).mT
        return (scores.softmax(-1) @ self.v(x)).mean(1)


@pytest.mark.parametrize("bias", [True, False])
def test_layers_over_positions_are_computed_together(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    together: list[set[str]] = []
    compute = SmallCallBatch._compute

    def counted(self: SmallCallBatch, waiting: list) -> None:
        together.append({record.site.name for _, record, _, _ in waiting})
        compute(self, waiting)

    monkeypatch.setattr(SmallCallBatch, "_compute", counted)
    model = nn.Sequential(Block(bias=bias), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    with FisherMonitor(model, "sum", per_sample=True) as monitor:
        for _ in range(6):
            together.clear()
            model(x).square().sum().backward()
    assert {"0.q", "0.k", "0.v"} in together  # in the last pass, in which nothing is looked for
    named = dict(model.named_parameters())
    each = [torch.autograd.grad(model(x[n : n + 1]).square().sum(), list(named.values())) for n in range(5)]
    expected = {
        name: torch.stack([g.square().sum() for g in grads])
        for name, grads in zip(named, zip(*each, strict=True), strict=True)
    }
    for name, norms in expected.items():
        found = torch.tensor(monitor.per_sample[name].to_numpy()[-5:])
        assert_equal(found, norms, sum(expected.values()))
