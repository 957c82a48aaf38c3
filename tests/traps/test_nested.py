"""Trap 29, nested tensors: samples of different lengths in one tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracles import assert_equal
from problems._base import Forward
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report
from traps.test_crashes import Holding

pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors", "ignore:.*nested tensors.*prototype"
)


def pooled(m: Any, x: Tensor) -> Tensor:
    h = m.norm(m.l(x)).sin()
    return m.h(torch.stack([row.mean(0) for row in h.unbind()]))


def padded_soon(m: Any, x: Tensor) -> Tensor:
    return m.h(m.l(x).to_padded_tensor(0.0).tanh().sum(1))


def with_a_parameter(m: Any, x: Tensor) -> Tensor:
    h = m.l(x) * m.w
    return m.h(torch.stack([row.mean(0) for row in h.unbind()]))


def of_words(m: Any, x: Tensor) -> Tensor:
    return m.h(torch.stack([row.sum(0) for row in m.e((x[..., 0] * 3).abs().long()).unbind()]))


def attention(m: Any, x: Tensor) -> Tensor:
    """On a CPU torch takes it apart into nested tensors of strided layout, whose nodes have no shapes."""
    q, k, v = (layer(x).unflatten(-1, [2, 2]).transpose(1, 2) for layer in (m.q, m.k, m.v))
    h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
    return m.h(torch.stack([row.mean(0) for row in h.unbind()]))


def models() -> dict[str, nn.Module]:
    return {
        "pooled": Forward(pooled, l=nn.Linear(4, 4), norm=nn.LayerNorm(4), h=nn.Linear(4, 3)),
        "padded soon": Forward(padded_soon, l=nn.Linear(4, 4), h=nn.Linear(4, 3)),
        "a parameter": Holding(with_a_parameter, parameters={"w": torch.ones(4)}, l=nn.Linear(4, 4), h=nn.Linear(4, 3)),
        "attention": Forward(attention, **{name: nn.Linear(4, 4) for name in "qkv"}, h=nn.Linear(4, 3)),
        "words": Forward(of_words, e=nn.Embedding(30, 4), h=nn.Linear(4, 3)),
    }


def rows(*lengths: int) -> Tensor:
    made = [torch.randn(length, 4, dtype=torch.float64) for length in lengths]
    return torch.nested.nested_tensor(made, layout=torch.jagged)


def one_by_one(model: nn.Module, losses: Callable[[Any], Tensor], x: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    found = [
        torch.autograd.grad(
            losses(model(torch.nested.nested_tensor([row], layout=torch.jagged)))[n], list(named.values())
        )
        for n, row in enumerate(x.unbind())
    ]
    return {name: torch.stack([row[i].square().sum() for row in found]) for i, name in enumerate(named)}


@pytest.mark.filterwarnings("ignore::torch_secorder.errors.SlowFallbackWarning")
@pytest.mark.parametrize("lengths", [(2, 3, 1), (3, 1, 2, 2), (2,)], ids=str)
@pytest.mark.parametrize("name", models())
def test_trap_29_nested_tensors(name: str, lengths: tuple[int, ...]) -> None:
    """The longest of three samples has three positions, so that shapes leave open which axis counts the samples."""
    model, x, n = models()[name].double(), rows(*lengths), len(lengths)
    y = torch.randint(3, (n,))
    expected = one_by_one(model, lambda outputs: F.cross_entropy(outputs.expand(n, -1), y, reduction="none"), x)
    everything = sum(t.mean() for t in expected.values())
    with FisherMonitor(model, per_sample=True, activations=True) as monitor:
        for _ in range(4):
            F.cross_entropy(model(x), y).backward()
    report = fisher_report(model, F.cross_entropy, (x, y), progress=False)["fisher_trace"]
    for parameter, t in expected.items():
        assert_equal(torch.tensor(monitor.per_sample[parameter].to_numpy()), t.repeat(4), everything * n)
        assert_equal(torch.tensor(report[parameter]), t.mean(), everything)
    assert_equal(empirical_fisher_trace(model, F.cross_entropy, x, y), everything, everything)


def test_trap_29_a_zero_gradient_of_a_nested_output() -> None:
    layer, head = nn.Linear(4, 4), nn.Linear(4, 3)
    nn.init.zeros_(head.weight)
    model = Forward(lambda m, x: m.head(torch.nested.to_padded_tensor(m.layer(x), 0.0).sum(1)), layer=layer, head=head)
    model, x, y = model.double(), rows(2, 3, 1), torch.tensor([0, 1, 2])
    losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    alone = [torch.autograd.grad(one, list(model.parameters()), retain_graph=True) for one in losses]
    expected = [sum(g.square().sum() for g in column) / 3 for column in zip(*alone, strict=True)]
    with FisherMonitor(model) as monitor:
        nn.functional.cross_entropy(model(x), y).backward()
    found = monitor.report()["fisher_trace"]
    for (name, _), trace in zip(model.named_parameters(), expected, strict=True):
        assert_equal(torch.tensor(found[name]), trace, sum(expected))
    assert found["layer.weight"] == 0
    assert_equal(empirical_fisher_trace(model, nn.functional.cross_entropy, x, y), sum(expected), sum(expected))


def test_trap_29_nested_outputs() -> None:
    """They are what the samples are looked for in, and what a sample alone is put into."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double(), rows(2, 3, 1)

    def losses(outputs: Tensor) -> Tensor:
        return torch.stack([row.square().sum() for row in outputs.unbind()])

    named = dict(model.named_parameters())
    found = [torch.autograd.grad(loss, list(named.values()), retain_graph=True) for loss in losses(model(x))]
    expected = {name: sum(row[i].square().sum() for row in found) / 3 for i, name in enumerate(named)}
    everything = sum(expected.values())
    with FisherMonitor(model) as monitor:
        outputs = model(x)
        loss = losses(outputs).mean()
        monitor.verify(loss)
        loss.backward()
    report = fisher_report(model, lambda outputs, _: losses(outputs).mean(), (x, None), progress=False)["fisher_trace"]
    for parameter, value in expected.items():
        assert_equal(torch.tensor(monitor.report().loc[parameter, "fisher_trace"]), value, everything)
        assert_equal(torch.tensor(report[parameter]), value, everything)
