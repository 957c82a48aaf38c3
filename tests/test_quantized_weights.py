"""Layers whose weights torchao has quantized: analyzed from what goes in and what comes back, the codes untouched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from torch_secorder import FisherMonitor, fisher_report, generalized_fisher_trace
from torch_secorder.errors import UnsupportedError, VerificationError
from torch_secorder.running.analysis import Analysis
from torch_secorder.verification import differentiable_model
from torch_secorder.verification.empirical import verify_empirical


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter beside it."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Network(nn.Module):
    """Sequences in, one prediction out; the first layer gets data that need no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Adapted(nn.Linear(12, 16)), Adapted(nn.Linear(16, 16))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh().mean(1))


def quantized() -> nn.Module:
    torch.manual_seed(1)
    model = Network()
    for adapted in (model.first, model.second):
        adapted.base.requires_grad_(False)
        quantize_(adapted.base, Int8WeightOnlyConfig())
    return model


def dequantized(model: nn.Module) -> nn.Module:
    """The same numbers in plain float64."""
    plain = Network().double()
    state = {k: v.dequantize() if hasattr(v, "dequantize") else v for k, v in model.state_dict().items()}
    plain.load_state_dict(state)
    return plain


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(6, 5, 12, generator=generator), torch.randint(3, (6,), generator=generator)


def oracle(model: nn.Module) -> dict[str, float]:
    """Mean squared norms from a loop over samples, by autograd in the dequantized weights."""
    x, y = batch()
    named = dict(model.named_parameters())
    sums = dict.fromkeys(named, 0.0)
    for n in range(len(x)):
        found = torch.autograd.grad(F.cross_entropy(model(x[n : n + 1].double()), y[n : n + 1]), list(named.values()))
        for name, g in zip(named, found, strict=True):
            sums[name] += float(g.square().sum()) / len(x)
    return sums


def monitored(model: nn.Module, **options: Any) -> dict[str, float]:
    x, y = batch()
    with FisherMonitor(model, **options) as monitor:
        F.cross_entropy(model(x), y).backward()
    return monitor.report()["fisher_trace"].to_dict()


def reported(model: nn.Module, **options: Any) -> dict[str, float]:
    return fisher_report(model, nn.CrossEntropyLoss(), batch(), progress=False, **options)["fisher_trace"].to_dict()


@pytest.mark.parametrize("way", [monitored, reported])
@pytest.mark.parametrize("parameters", ["trainable", "all"])
def test_the_numbers_are_those_of_the_dequantized_model(way: Any, parameters: str) -> None:
    model = quantized()
    before = copy.deepcopy(model.state_dict())
    wanted = oracle(dequantized(model))
    found = way(model, parameters=parameters)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(found) == (trainable if parameters == "trainable" else set(wanted))
    assert ("first.base.weight" in found) == (parameters == "all")
    # The int8 product itself is done in float32.
    assert found == pytest.approx({name: wanted[name] for name in found}, rel=1e-4, abs=1e-10)
    for name, value in model.state_dict().items():
        assert type(value) is type(before[name])
        assert torch.equal(*(v.dequantize() if hasattr(v, "dequantize") else v for v in (value, before[name])))
    assert not model.first.base.weight.requires_grad


def test_the_predictive_fisher() -> None:
    model = quantized()
    plain = dequantized(model)
    x, y = batch()
    exact = fisher_report(model, None, (x, y), fisher="exact", parameters="all", progress=False)
    wanted = fisher_report(plain, None, (x.double(), y), fisher="exact", progress=False)
    assert exact["fisher_trace"].to_dict() == pytest.approx(wanted["fisher_trace"].to_dict(), rel=1e-4, abs=1e-10)
    adapters = sum(value for name, value in wanted["fisher_trace"].items() if "base" not in name)
    assert float(generalized_fisher_trace(model, model(x), y)) == pytest.approx(adapters, rel=1e-4)


def test_a_quantized_weight_that_requires_a_gradient_is_refused() -> None:
    model = quantized()
    model.first.base.weight.requires_grad_(True)
    with pytest.raises(UnsupportedError, match=r"first\.base\.weight: a Int8Tensor that requires a gradient.*frozen"):
        FisherMonitor(model)


# The check, for which autograd has no gradient in the codes


def verify_with(model: nn.Module, spoilt: str | None) -> None:
    """Check an analysis, in which one parameter's norms are off by a per cent."""
    x, y = batch()
    analysis = Analysis(model, "all")
    found = analysis.empirical(F.cross_entropy, x, y)
    if spoilt is not None:
        found.samples.squared_norms[analysis.table.names.index(spoilt)] *= 1.01
    verify_empirical(analysis, F.cross_entropy, x, y, found)


def test_a_quantized_weight_is_checked_by_plain_autograd_in_the_numbers_it_stands_for() -> None:
    model = quantized()
    before = {name: id(p) for name, p in model.named_parameters()}
    verify_with(model, None)
    with pytest.raises(VerificationError, match=r"first\.base\.weight: .* in its batch") as raised:
        verify_with(model, "first.base.weight")
    assert "first.base.bias" not in str(raised.value)
    assert {name: id(p) for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("why", ["other numbers", "no numbers"])
def test_a_quantized_weight_that_cannot_be_checked_is_left_out_with_a_warning(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized()
    if why == "other numbers":
        monkeypatch.setattr(differentiable_model, "DEQUANTIZED_OUTPUTS", 0.0)
    else:
        monkeypatch.setattr(type(model.first.base.weight), "dequantize", lambda self: 1 / 0)
    words = r"not verified: first\.base\.weight, second\.base\.weight\. Autograd"
    with pytest.warns(UserWarning, match=words):
        verify_with(model, "first.base.weight")
    with pytest.warns(UserWarning, match=words), pytest.raises(VerificationError, match=r"first\.base\.bias: "):
        verify_with(model, "first.base.bias")
