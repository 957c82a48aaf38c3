"""Weights that other packages pack, two codes to a byte: a rule says which shape they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_secorder import FisherMonitor, fisher_report, fisher_results, register_rule
from torch_secorder.errors import ArgumentError
from torch_secorder.model import packed
from torch_secorder.per_sample import Dense
from torch_secorder.rules import registry


class Linear4Bit(nn.Module):
    """As packages for 4-bit weights lay them out: a column of bytes, in each of which are two codes."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.weight = nn.Parameter(torch.randint(256, (inputs * outputs // 2, 1)).to(torch.uint8), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(outputs), requires_grad=False)

    def unpacked(self) -> Tensor:
        codes = torch.cat([self.weight >> 4, self.weight & 15], 1).to(self.bias.dtype)
        return (codes / 8 - 1).view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.unpacked(), self.bias)


def gradients(module: Any, call: Any) -> dict[str, Tensor | Dense]:
    return {"weight": torch.einsum("n...o,n...i->noi", call.grad_output, call.inputs[0]), "bias": call.grad_output}


@pytest.fixture(autouse=True)
def _rules() -> Iterator[None]:
    before, shapes = dict(registry._rules), dict(packed._shapes)
    register_rule(Linear4Bit, shapes=lambda module: {"weight": (module.out_features, module.in_features)})(gradients)
    yield
    for kept, now in ((before, registry._rules), (shapes, packed._shapes)):
        now.clear()
        now.update(kept)


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), Linear4Bit(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))


def squares(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """The Fisher diagonal in the unpacked weight, from a loop over samples."""
    weight, rows = model[2].unpacked().requires_grad_(), []
    for n in range(len(x)):
        hidden = F.linear(model[1](model[0](x[n : n + 1])), weight, model[2].bias)
        rows.append(torch.autograd.grad(F.cross_entropy(model[3:](hidden), y[n : n + 1]), weight)[0].square())
    return torch.stack(rows).mean(0)


@pytest.mark.filterwarnings("ignore:not verified. 2.weight")
def test_packed_weights_have_the_shape_that_their_rule_declares(tmp_path: Path) -> None:
    model, x, y = problem()
    expected, codes = squares(model, x, y), model[2].weight.clone()
    results = fisher_results(model, F.cross_entropy, (x, y), parameters="all", diagonal=True, progress=False)
    with FisherMonitor(model, parameters="all", diagonal=True) as monitor:
        F.cross_entropy(model(x), y).backward()
    for found in (results, monitor):
        row = found.report().loc["2.weight"]
        assert (row["shape"], row["numel"]) == ((4, 6), 24)
        assert row["fisher_trace"] == pytest.approx(float(expected.sum()), rel=1e-8)
        torch.testing.assert_close(found.diagonal["2.weight"], expected)
    assert torch.equal(model[2].weight, codes)
    results.save(tmp_path / "packed.safetensors")
    assert FisherMonitor.load(tmp_path / "packed.safetensors", model).n_samples == 5


def test_shapes_are_of_codes_only() -> None:
    class Other(nn.Linear):
        pass

    register_rule(Other, shapes=lambda module: {"weight": (3, 4)})(gradients)
    with pytest.raises(ArgumentError, match=r"'weight' of shape \(2, 2\) stands for.*\(3, 4\).*packed codes only"):
        fisher_report(Other(2, 2), F.cross_entropy, (torch.ones(3, 2), torch.zeros(3).long()), progress=False)


@pytest.mark.filterwarnings("ignore:not verified. 1.weight", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_four_bit_weights_of_bitsandbytes() -> None:
    """Exact for the numbers that the codes stand for, in a layer of the package itself."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="it is an extra of the tests: make installs it")
    layer = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict({"weight": torch.randn(64, 64) / 8, "bias": torch.randn(64)})
    model = nn.Sequential(nn.Linear(64, 64), layer.to("cpu"), nn.Tanh(), nn.Linear(64, 3))
    x, y = torch.randn(5, 64), torch.randint(3, (5,))
    model(x)  # the first call packs nothing any more
    register_rule(type(layer), shapes=lambda module: {"weight": (module.out_features, module.in_features)})(gradients)
    plain = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).detach()
    twin = nn.Sequential(model[0], nn.Linear(64, 64), *model[2:])
    twin[1].load_state_dict({"weight": plain, "bias": layer.bias.detach()})
    twin = twin.double()
    expected = {name: 0.0 for name, _ in twin.named_parameters()}
    for n in range(len(x)):
        loss = F.cross_entropy(twin(x[n : n + 1].double()), y[n : n + 1])
        for name, g in zip(expected, torch.autograd.grad(loss, list(twin.parameters())), strict=True):
            expected[name] += float(g.square().sum()) / len(x)
    twin.float()  # its first and last layers are the model's own
    report = fisher_report(model, F.cross_entropy, (x, y), parameters="all", progress=False)
    with FisherMonitor(model, parameters="all") as monitor:
        F.cross_entropy(model(x), y).backward()
    for table in (report, monitor.report()):
        assert table.loc["1.weight", "shape"] == (64, 64)
        for name, value in expected.items():
            assert table.loc[name, "fisher_trace"] == pytest.approx(value, rel=1e-4)
