"""Layers that are known by their code, and layers that only look like them, which go through the graph."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from oracles import assert_equal, per_sample_squared_norms, total, trace
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report
from torch_secorder.errors import UnsupportedError
from torch_secorder.rules import Rule, rule_for

modeling = pytest.importorskip("transformers.pytorch_utils")

from transformers.models.gemma.modeling_gemma import GemmaRMSNorm  # noqa: E402  # not before it is known to be there
from transformers.models.llama.modeling_llama import LlamaRMSNorm  # noqa: E402
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm  # noqa: E402
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm  # noqa: E402
from transformers.models.t5.modeling_t5 import T5LayerNorm  # noqa: E402

KNOWN: dict[str, Callable[[], nn.Module]] = {
    "Conv1D": lambda: modeling.Conv1D(6, 6),
    "Llama": lambda: LlamaRMSNorm(6),
    "Qwen3": lambda: Qwen3RMSNorm(6),
    "Olmo2": lambda: Olmo2RMSNorm(6),
    "T5": lambda: T5LayerNorm(6),
}
SHAPES = [(5, 4), (5, 3, 4)]


class Net(nn.Module):
    """A layer between two Linear ones, checkpointed on request."""

    def __init__(self, layer: nn.Module, *, checkpointed: bool = False):
        super().__init__()
        self.first, self.layer, self.last, self.checkpointed = nn.Linear(4, 6), layer, nn.Linear(6, 3), checkpointed
        with torch.no_grad():
            for p in self.layer.parameters():
                p.normal_()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(checkpoint(self.layer, h, use_reentrant=False) if self.checkpointed else self.layer(h))


def drawn(model: nn.Module, *shape: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The model with inputs and targets."""
    x = torch.randn(shape)
    return model, x, torch.randn_like(model(x))


def assert_exact(report: Any, model: nn.Module, x: Tensor, y: Tensor, parameters: str = "trainable") -> None:
    # The norms are taken in float32 whatever the model's dtype.
    squared = per_sample_squared_norms(model, nn.MSELoss(), x, y, parameters=parameters)
    expected = trace(squared)
    assert list(report.index) == list(expected)
    for name, value in expected.items():
        assert_equal(torch.tensor(report.loc[name, "fisher_trace"]), value, total(expected), torch.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", KNOWN)
def test_a_frozen_layer_is_exact(name: str, shape: tuple[int, ...]) -> None:
    model, x, y = drawn(Net(KNOWN[name]()), *shape)
    model.layer.requires_grad_(False)
    with FisherMonitor(model, parameters="all") as monitor:
        nn.MSELoss()(model(x), y).backward()
    assert_exact(monitor.report(), model, x, y, "all")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", KNOWN)
def test_a_checkpointed_layer_is_exact(name: str, shape: tuple[int, ...]) -> None:
    model, x, y = drawn(Net(KNOWN[name](), checkpointed=True), *shape)
    with FisherMonitor(model) as monitor:
        nn.MSELoss()(model(x), y).backward()
    assert_exact(monitor.report(), model, x, y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in KNOWN if name != "Conv1D"])
def test_a_layer_in_half_precision_is_what_the_graph_says(name: str, dtype: torch.dtype) -> None:
    layer, x = KNOWN[name]().to(dtype), torch.randn(5, 1, 6).to(dtype)
    with FisherMonitor(layer, per_sample=True) as monitor:
        layer(x).sum().backward()
    expected = [torch.autograd.grad(layer(one).sum(), layer.weight)[0].double().square().sum() for one in x]
    # One position per sample, so that the two differ by the rounding of the gradient's entries alone.
    found = torch.tensor(monitor.per_sample["weight"].to_numpy())
    torch.testing.assert_close(found, torch.stack(expected) * 25, rtol=4 * torch.finfo(dtype).eps, atol=0.0)


@pytest.mark.parametrize("name", [name for name in KNOWN if name != "Conv1D"])
def test_what_a_norm_computed_is_used_rather_than_computed_again(name: str) -> None:
    """A number of the layer that changes after forward shows which it is."""
    layer, x = KNOWN[name](), torch.randn(5, 3, 6)
    expected = total(trace(per_sample_squared_norms(layer, nn.MSELoss(), x, x)))
    with FisherMonitor(layer) as monitor:
        loss = nn.MSELoss()(layer(x), x)
        layer.variance_epsilon = 1.0
        loss.backward()
    assert_equal(torch.tensor(monitor.report().fisher_trace.sum()), expected, expected, torch.float32)


def test_a_hook_that_scales_a_norm_is_not_taken_for_its_product() -> None:
    """The hook's product saves a tensor of the output's shape, too."""
    model, x, y = drawn(Net(KNOWN["Llama"]()), 5, 3, 4)
    model.layer.register_forward_hook(lambda module, args, output: output * output.detach().cos())
    with FisherMonitor(model) as monitor:
        nn.MSELoss()(model(x), y).backward()
    assert_exact(monitor.report(), model, x, y)


@pytest.mark.parametrize("seed", range(3))
def test_layers_that_compute_in_float32_in_a_model_in_float64_are_exact(seed: int) -> None:
    """Their gradients have the digits of float32, which the check of the sums goes by."""

    class Single(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x.float(), self.weight.float(), self.bias.float()).double()

    torch.manual_seed(seed)
    model, x = nn.Sequential(Single(8, 16), nn.Tanh(), Single(16, 4)).double(), torch.randn(6, 8).double()
    y = torch.randn(6, 4).double()
    with FisherMonitor(model) as monitor:
        nn.MSELoss()(model(x), y).backward()
    assert_exact(monitor.report(), model, x, y)


class Stranger(nn.Module):
    """The same statements under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.randn(6)), 1e-6

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class OneStatementLess(Stranger):
    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class OneParameterMore(Stranger):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(6))


class WeightOfItsOwn(nn.Module):
    forward = Stranger.forward

    def __init__(self) -> None:
        super().__init__()
        self._parameters["weight"] = nn.Parameter(torch.randn(6))
        self.variance_epsilon = 1e-6

    @property
    def weight(self) -> Tensor:
        return self._parameters["weight"].relu()


class CalledOtherwise(Stranger):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x.tanh())


def test_a_layer_is_known_by_its_code_whatever_its_name() -> None:
    rule = rule_for(Stranger())
    assert isinstance(rule, Rule)
    assert rule.name == "rms_norm"


@pytest.mark.parametrize("kind", [OneStatementLess, OneParameterMore, WeightOfItsOwn, CalledOtherwise])
def test_what_is_not_the_same_is_not_known(kind: type[nn.Module]) -> None:
    assert "no rule" in str(rule_for(kind()))


def test_a_torch_of_its_own_is_not_known() -> None:
    class Other(Stranger):
        pass

    names = {"torch": type("Torch", (), {"float32": torch.float32, "rsqrt": torch.sqrt})}
    Other.forward = type(Stranger.forward)(Stranger.forward.__code__, names)  # type: ignore[method-assign]
    assert "no rule" in str(rule_for(Other()))


def test_a_forward_that_was_replaced_on_the_instance_is_not_known() -> None:
    layer = Stranger()
    layer.forward = lambda x: x * layer.weight  # type: ignore[method-assign]
    assert "replaced on the instance" in str(rule_for(layer))


class Clamped(nn.Module):
    """A learned gain in front of a fixed-point range."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).clamp(-6, 6)


class PositiveGain(Clamped):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.relu()


class DetachedGain(Clamped):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.detach()


LOOKALIKES = [Clamped, PositiveGain, DetachedGain]


def lookalike(kind: type[nn.Module]) -> tuple[nn.Module, Tensor, Tensor]:
    """A model in which many of the layer's outputs are out of range, with some negative weights."""
    torch.manual_seed(0)
    model = Net(kind()).double()
    with torch.no_grad():
        model.first.weight.mul_(12)
    x = torch.randn(16, 4, dtype=torch.float64)
    return model, x, torch.randn(16, 3, dtype=torch.float64)


@pytest.mark.parametrize("kind", LOOKALIKES)
def test_what_looks_like_a_scale_is_exact_everywhere(kind: type[nn.Module]) -> None:
    model, x, y = lookalike(kind)
    expected = trace(per_sample_squared_norms(model, nn.MSELoss(), x, y))
    everything = total(expected)
    for _ in range(6):  # of which the library checks some
        assert_equal(empirical_fisher_trace(model, nn.MSELoss(), x, y), everything, everything)
    report = fisher_report(model, nn.MSELoss(), (x, y), progress=False)
    for name, value in expected.items():
        assert_equal(torch.tensor(report.loc[name, "fisher_trace"]), value, everything, torch.float64)


@pytest.mark.parametrize("kind", LOOKALIKES)
def test_what_looks_like_a_scale_is_exact_in_passes_that_are_not_checked(kind: type[nn.Module]) -> None:
    """Small inputs, at which it is one, come first."""
    model, x, y = lookalike(kind)
    expected = per_sample_squared_norms(model, nn.MSELoss(), x, y)
    with FisherMonitor(model, per_sample=True) as monitor:
        for factor in (0.01, 0.01, 0.01, 1.0, 0.01, 1.0, 1.0, 1.0):
            nn.MSELoss()(model(factor * x), y).backward()
    for name, t in expected.items():
        rows = torch.tensor(monitor.per_sample[name].to_numpy()).view(8, 16)
        for number in (3, 5, 6, 7):
            assert_equal(rows[number], t, 16 * total(trace(expected)))


@pytest.mark.parametrize("kind", [*LOOKALIKES, lambda: GemmaRMSNorm(6)])
def test_a_frozen_layer_that_nobody_knows_is_refused_with_the_remedy(kind: Callable[[], nn.Module]) -> None:
    model = Net(kind())
    model.layer.requires_grad_(False)
    with pytest.raises(UnsupportedError, match=r"'layer' \(weight\).*\n.*register_rule.*require a gradient"):
        FisherMonitor(model, parameters="all").__enter__()
